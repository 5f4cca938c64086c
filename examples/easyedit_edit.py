"""Edit a model inside EasyEdit, with NMKE or any of EasyEdit's own methods, on a ZsRE or CounterFact file.

Takes the arguments of EasyEdit's examples/run_AlphaEdit_editing.py:

    EASYEDIT_HOME=~/EasyEdit python examples/easyedit_edit.py --hparams_dir hparams/NMKE/llama3-8b.yaml \
        --data_dir data/ --data_type ZsRE --ds_size 100 --sequential_edit

    EASYEDIT_HOME=~/EasyEdit python examples/easyedit_edit.py --editing_method AlphaEdit \
        --hparams_dir ~/EasyEdit/hparams/AlphaEdit/llama3-8b.yaml --data_dir data/zsre_mend_eval.json --ds_size 100

`--data_dir` is a folder with the files EasyEdit names, or one JSON file in any format that `easyedit_nmke.data.load` reads.
With --sequential_edit EasyEdit scores each request right after its own edit. To score all of them after the last edit, as the
paper does, use `nmke run`.
"""

import argparse
import json
import sys
from pathlib import Path

import easyedit_nmke
from easyedit_nmke import data
from easyedit_nmke.methods import methods

# In a folder, the first pattern that matches anything decides.
FILES = {
    "ZsRE": ("zsre_mend_eval.json", "*zsre*.json"),
    "CF": ("counterfact.json", "counterfact*.json"),
    "MCF": ("multi_counterfact.json", "multi_counterfact*.json"),
}
SOURCE = "https://memit.baulab.info/data/dsets"


def main(argv=None) -> int:
    args = read_arguments(argv)
    easyeditor = easyedit_nmke.register(text_only=True)
    requests = read_requests(find_file(args.data_dir, args.data_type), args.ds_size)

    hparams = hparams_class(easyeditor, args.editing_method).from_hparams(args.hparams_dir)
    name = str(hparams.model_name)
    if name == "atlas":  # a name that only this package knows; EasyEdit takes the model and its tokenizer as well
        hparams.model_name = easyedit_nmke.atlas.load()
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    editor.model_name = name  # EasyEdit's scorer looks into the text of it, which a (model, tokenizer) pair has not

    metrics, _, _ = editor.edit_requests(requests, sequential_edit=args.sequential_edit, test_generation=args.test_generation)

    size, sequential = len(requests), args.sequential_edit
    out = Path(args.output_dir) / f"{Path(name).name}_{args.editing_method}_N={size}_Sequential={sequential}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(metrics, indent=4, ensure_ascii=False))
    print(f"Metrics of {size} edits: {out}")
    return 0


def read_arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editing_method", default="NMKE", help="NMKE, or a method of EasyEdit, by EasyEdit's name")
    parser.add_argument("--hparams_dir", required=True, help="the method's YAML file")
    parser.add_argument("--data_dir", required=True, help="a folder of data files, or one JSON file")
    parser.add_argument("--data_type", choices=FILES, help="which file, when --data_dir is a folder")
    parser.add_argument("--output_dir", default="./outputs")
    parser.add_argument("--ds_size", default=3, type=int, help="records to read, from the first")
    parser.add_argument("--sequential_edit", action="store_true", help="keep each edit (without it each is undone once scored)")
    parser.add_argument("--test_generation", action="store_true", help="also fluency, which needs nltk's punkt data")
    args = parser.parse_args(argv)
    if Path(args.data_dir).is_dir() and args.data_type is None:
        parser.error(f"--data_dir {args.data_dir} is a folder: say which of its files with --data_type ({', '.join(FILES)})")
    return args


def find_file(data_dir: str, data_type: str | None) -> Path:
    place = Path(data_dir)
    if not place.is_dir():
        return place
    for pattern in FILES[data_type]:
        for path in sorted(place.glob(pattern)):
            return path
    name = FILES[data_type][0]
    raise SystemExit(f"{place} has no file {' or '.join(FILES[data_type])}; the original is at {SOURCE}/{name}")


def read_requests(path: Path, size: int) -> list[dict]:
    requests, refused = data.load(path, limit=size)
    for refusal in refused:
        print(f"left out: {refusal}", file=sys.stderr)
    if not requests:
        raise SystemExit(f"none of the first {size} records of {path} can be edited")
    return [request.to_dict() for request in requests]


def hparams_class(easyeditor, method: str):
    """The hyperparameter class of a method: EasyEdit writes R-ROME as R_ROMEHyperParams, SERAC as SERACHparams. Of those that
    EasyEdit lacks (NMKE and others), this package's."""
    classes = {plain(name): value for name, value in vars(easyeditor).items() if isinstance(value, type)}
    for suffix in ("hyperparams", "hparams"):
        if plain(method) + suffix in classes:
            return classes[plain(method) + suffix]
    if method in methods():
        return methods()[method].hparams
    raise SystemExit(f"EasyEdit has no method {method!r}; it has {', '.join(sorted(easyeditor.ALG_DICT))}")


def plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


if __name__ == "__main__":
    sys.exit(main())
