"""NMKE inside EasyEdit: find a checkout, put the method into it. The only file that imports ``easyeditor``.

    import easyedit_nmke
    easyedit_nmke.register()                    # every package EasyEdit imports is installed
    easyedit_nmke.register(text_only=True)      # without its image and video packages

    from easyeditor import BaseEditor
    editor = BaseEditor.from_hparams(easyedit_nmke.NMKEHyperParams.from_hparams("hparams/NMKE/llama3-8b.yaml"))

EasyEdit is a checkout, not a package one can install: it is looked for at ``EASYEDIT_HOME``, else on ``sys.path``.
Nothing is remembered here: whether NMKE is registered is read off EasyEdit's own tables.
"""

import builtins
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ..messages import did_you_mean, how_to_install

ALG_NAME = "NMKE"
ACCELERATED = ("AlphaEdit", "MEMIT")
MULTIMODAL_PACKAGES = frozenset({"av", "cv2", "fairscale", "iopath", "qwen_vl_utils", "timm", "torchvision"})
_HOW_TO_GET = "run `git clone https://github.com/zjunlp/EasyEdit` and set EASYEDIT_HOME to the clone"

logger = logging.getLogger(__name__)


def register(text_only: bool = False) -> ModuleType:
    """Puts NMKE, and every other method that EasyEdit lacks, among its methods and its batchable methods; returns the imported
    ``easyeditor``.

    ``easyeditor`` may have been imported before or not; a second call changes nothing, and neither does the first where EasyEdit
    reads entry points (docs/upstream.md): it found them by itself. With ``text_only`` it is imported
    inside :func:`text_only`. Raises ImportError, one sentence, when EasyEdit is missing, lacks a package, or is too old.
    """
    home = find_easyedit()
    easyeditor = _import_easyedit(home, behind_placeholders=text_only)
    from ..methods import applied, apply_nmke_to_model, methods  # here, so that importing the package stays light

    table, batchable = _tables(home)
    if table.get(ALG_NAME) is not apply_nmke_to_model:
        if ALG_NAME in table:
            logger.warning(
                "EasyEdit at %s already has a method %r (%r): replaced by this package's", home, ALG_NAME, table[ALG_NAME]
            )
        table[ALG_NAME] = apply_nmke_to_model
    theirs = {name.lower() for name in table}
    for name, method in methods().items():
        if name.lower() not in theirs:
            table[name] = applied(method)
    ours = {name for name, apply in table.items() if hasattr(apply, "of_easyedit_nmke")}
    if not all(map(batchable.is_batchable_method, ours)):
        batchable.is_batchable_method = staticmethod(_or_ours(batchable.is_batchable_method, ours))
    logger.info("%s are registered in EasyEdit at %s", ", ".join(sorted(ours)), home)
    return easyeditor


def easyedit_method(name: str) -> tuple[str, Callable, type]:
    """(EasyEdit's spelling of the name, its function, its class of hyperparameters) of one of EasyEdit's own methods.

    Upper and lower case do not matter. Where the function belongs to an object that EasyEdit keeps for everybody (MEND, SERAC,
    UltraEdit), it is of a new object of that kind. Raises ValueError with the known names, and what `register` does.
    """
    register(text_only=True)
    table = _tables(find_easyedit())[0]
    methods = {known.lower(): known for known, apply in table.items() if not hasattr(apply, "of_easyedit_nmke")}
    if name.lower() not in methods:
        hint = did_you_mean(name, methods.values())
        raise ValueError(f"EasyEdit has no method {name!r}{hint}; it has {', '.join(methods.values())}")
    name = methods[name.lower()]
    apply = table[name]
    kind = importlib.import_module("easyeditor.util.hparams").HyperParams
    package = vars(importlib.import_module(apply.__module__.rpartition(".")[0])).values()
    settings = [c for c in package if isinstance(c, type) and issubclass(c, kind) and c is not kind]
    owner = getattr(apply, "__self__", None)
    if owner is not None:
        apply = getattr(type(owner)(), apply.__name__)
    return name, apply, next(c for c in settings if "Multimodal" not in c.__name__)


def easyedit_scorer() -> Callable:
    """EasyEdit's `compute_edit_quality`. Errors as :func:`register`."""
    _import_easyedit(find_easyedit(), behind_placeholders=True)
    return importlib.import_module("easyeditor.evaluate").compute_edit_quality


def accelerate_easyedit(restore: bool = False, text_only: bool = False) -> ModuleType:
    """Lets EasyEdit's AlphaEdit and MEMIT run on this package's engine: same files, same calls, the same updates to a few parts in
    100 000 given the same templates and statistics. Returns the imported ``easyeditor``.

    Context templates are this engine's (sampled with a seed), AlphaEdit's P is read from `P_loc` where that is a file, and what one
    edit leaves to the next belongs to the model, not to a module. With ``restore`` EasyEdit's own functions are put back. A second
    call changes nothing. ValueError, when an edit starts, for settings that this engine does not have. Errors as :func:`register`.
    """
    home = find_easyedit()
    easyeditor = _import_easyedit(home, behind_placeholders=text_only)
    methods, _ = _tables(home)
    for name in ACCELERATED:
        original = getattr(methods[name], "easyedits_own", None)
        if restore and original is not None:
            methods[name] = original
        elif not restore and original is None:
            methods[name] = _on_this_engine(name, methods[name])
    return easyeditor


def _on_this_engine(name: str, original: Callable) -> Callable:
    """EasyEdit's calling convention and hyperparameter object in front of this package's method of that name."""

    def apply(model, tok, requests, hparams, *args, **kwargs):
        from ..methods import apply_to_model, method_named

        kind = method_named(name).hparams
        known = {field: getattr(hparams, field) for field in kind.__dataclass_fields__ if hasattr(hparams, field)}
        settings = kind.from_dict(known, source=f"EasyEdit's {type(hparams).__name__}")
        return apply_to_model(model, tok, requests, settings, *args, **kwargs)

    apply.__name__ = apply.__qualname__ = f"apply_{name}_to_model"
    apply.easyedits_own = original
    return apply


def find_easyedit() -> Path:
    """The directory that holds the package ``easyeditor``, importable when this returns; it is not imported here.

    An ``easyeditor`` already imported wins, then ``EASYEDIT_HOME`` (put on ``sys.path``), then ``sys.path`` as it is.
    """
    wanted = os.environ.get("EASYEDIT_HOME")
    found = _importable()
    if not wanted:
        if found is None:
            raise ImportError(
                f"EasyEdit was not found: no package `easyeditor` on sys.path and EASYEDIT_HOME is not set; {_HOW_TO_GET}."
            )
        return found
    home = Path(wanted).expanduser().resolve()
    if found == home:
        return home
    if "easyeditor" in sys.modules and found is not None:
        logger.warning("easyeditor was already imported from %s, so EASYEDIT_HOME=%s has no effect here", found, wanted)
        return found
    if not (home / "easyeditor" / "__init__.py").is_file():
        raise ImportError(f"EasyEdit was not found: EASYEDIT_HOME={wanted} has no easyeditor/__init__.py; {_HOW_TO_GET}.")
    sys.path.insert(0, str(home))
    importlib.invalidate_caches()
    return home


@contextmanager
def text_only() -> Iterator[None]:
    """Inside it, EasyEdit's own files may import the packages of its image and video part although they are missing.

        from easyedit_nmke.easyedit.register import text_only
        with text_only():
            import easyeditor

    Each name such a file imports from a missing package of ``MULTIMODAL_PACKAGES`` is bound to a placeholder: a class that
    can be named, subclassed and looked into, and raises ImportError with the package's name when called or instantiated.
    Placeholders never enter ``sys.modules`` and only files of ``easyeditor`` are given them, so availability checks
    (``importlib.util.find_spec``, transformers' ``is_torchvision_available``) keep telling the truth. Packages that are
    installed are imported as ever. Unlike an import hook in ``sys.meta_path``, ``__import__`` is told who imports.
    """
    original = builtins.__import__

    def import_or_placeholder(name, globals=None, locals=None, fromlist=(), level=0):
        package = name.partition(".")[0]
        if level == 0 and package in MULTIMODAL_PACKAGES and _is_easyedit_file(globals) and not _is_installed(package):
            logger.debug("placeholder for %s in %s", name, globals["__name__"])
            return _placeholder(name if fromlist else package)
        return original(name, globals, locals, fromlist, level)

    builtins.__import__ = import_or_placeholder
    try:
        yield
    finally:
        builtins.__import__ = original


class _Placeholder(type):
    """Metaclass of the placeholders: any attribute is another placeholder, any call is an ImportError."""

    def __getattr__(cls, name: str) -> "_Placeholder":
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(f"{cls.path}.{name}")

    def __call__(cls, *args, **kwargs):
        package = cls.path.partition(".")[0]
        raise ImportError(
            f"{cls.path} was called but {package} is not installed: EasyEdit was imported text-only and this "
            f"belongs to its image and video part; install {package} and start again.",
            name=package,
        )

    def __repr__(cls) -> str:
        return f"<placeholder for {cls.path}>"


def _placeholder(path: str) -> _Placeholder:
    return _Placeholder(path.rpartition(".")[2], (), {"path": path})


def _is_easyedit_file(importer: dict | None) -> bool:
    return ((importer or {}).get("__name__") or "").partition(".")[0] == "easyeditor"


def _is_installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _importable() -> Path | None:
    """Where ``import easyeditor`` would load it from, or has; None where it would fail."""
    spec = sys.modules["easyeditor"].__spec__ if "easyeditor" in sys.modules else importlib.util.find_spec("easyeditor")
    # A directory without __init__.py gives a spec too, a namespace, with no origin: not EasyEdit.
    return Path(spec.origin).resolve().parent.parent if spec is not None and spec.origin else None


def _import_easyedit(home: Path, behind_placeholders: bool) -> ModuleType:
    try:
        if not behind_placeholders:
            return importlib.import_module("easyeditor")
        with text_only():
            return importlib.import_module("easyeditor")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in MULTIMODAL_PACKAGES:
            advice = "install it, or call easyedit_nmke.register(text_only=True) to do without EasyEdit's image and video part"
        elif package in ("easyeditor", "transformers"):
            raise _too_old(home, error) from error
        else:
            advice = f"install it ({how_to_install('easyedit')} brings what the text methods need)"
        raise ImportError(
            f"EasyEdit at {home} needs the package {package}, which is not installed; {advice}.", name=package
        ) from error
    except (ImportError, AttributeError) as error:
        raise _too_old(home, error) from error


def _tables(home: Path) -> tuple[dict, type]:
    """EasyEdit's dictionary of methods (one object under every name it was copied to) and its enum of batchable methods."""
    try:
        methods = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT
        batchable = importlib.import_module("easyeditor.editors.batch_editor").BatchEditor
        batchable.is_batchable_method(ALG_NAME)
        return methods, batchable
    except (ImportError, AttributeError) as error:
        raise _too_old(home, error) from error


def _too_old(home: Path, cause: Exception) -> ImportError:
    import transformers

    return ImportError(
        f"EasyEdit at {home} is too old for this package or for transformers {transformers.__version__} "
        f"({type(cause).__name__}: {cause}); update that clone, or {_HOW_TO_GET} (not the `easyeditor` of the "
        "package index, which was abandoned in 2023)."
    )


def _or_ours(is_batchable: Callable[[str], bool], ours: set[str]) -> Callable[[str], bool]:
    def is_batchable_method(alg_name: str) -> bool:
        return alg_name in ours or is_batchable(alg_name)

    return is_batchable_method
