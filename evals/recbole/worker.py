"""Fits a sequential model of RecBole and leaves what it measured: runs in RecBole's environment.

    python worker.py job.json

RecBole needs older libraries than DeepRec, so this file imports nothing of ours; peer.py writes the
job and reads what is left beside it: `result.json` and, where a ranking is asked for,
`rankings.jsonl`.
"""

import json
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path

VERSION = version("recbole")  # fails at once where it is missing

# RecBole imports ray for its search over hyper-parameters, which is not wanted here.
sys.modules.setdefault("ray", types.ModuleType("ray"))
sys.modules.setdefault("ray.tune", types.ModuleType("ray.tune"))
sys.modules["ray"].tune = sys.modules["ray.tune"]

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed


def main(job_file):
    """Fit, test and rank as the job says."""
    job = json.loads(Path(job_file).read_text("utf-8"))
    folder = Path(job_file).parent
    config = Config(
        model=job["model"],
        dataset=job["dataset"],
        config_dict={
            "data_path": str(folder),
            "USER_ID_FIELD": "user_id",
            "ITEM_ID_FIELD": "item_id",
            "TIME_FIELD": "timestamp",
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "train_neg_sample_args": None,
            "eval_args": {
                "split": {"LS": "valid_and_test"},
                "order": "TO",
                "group_by": "user",
                "mode": "full",
            },
            "metrics": ["Recall", "NDCG", "MRR"],
            "topk": [1, 5, 10, 20],
            "valid_metric": "NDCG@10",
            "use_gpu": False,
            "show_progress": False,
            "save_dataset": False,
            "log_wandb": False,
            "reproducibility": True,
            "seed": job["seed"],
            "epochs": job["epochs"],
            "checkpoint_dir": str(folder / "checkpoints"),
            **job["options"],
        },
    )
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    counts = {
        "users": dataset.user_num - 1,
        "items": dataset.item_num - 1,
        "interactions": dataset.inter_num,
    }
    # Before the split, which turns interactions into examples.
    past = past_of_users(dataset.inter_feat)
    train, valid, test = data_preparation(config, dataset)
    torch.set_num_threads(job["threads"])
    model = get_model(config["model"])(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    seconds = timed_epochs(trainer)
    best, _ = trainer.fit(train, valid, saved=True, show_progress=False)
    report = trainer.evaluate(test, load_best_model=True, show_progress=False)
    if job["top"]:
        rank(model, dataset, test, past, job["top"], folder / "rankings.jsonl")
    result = {
        "recbole": VERSION,
        "torch": torch.__version__,
        "threads": job["threads"],
        **counts,
        "examples": len(train.dataset),
        "epoch_seconds": seconds,
        "valid_ndcg_10": float(best),
        "report": {name: float(value) for name, value in report.items()},
    }
    (folder / "result.json").write_text(json.dumps(result), "utf-8")


def timed_epochs(trainer):
    """A list that fills with the seconds of each training epoch."""
    seconds = []
    epoch = trainer._train_epoch

    def timed(*args, **kwargs):
        began = time.perf_counter()
        loss = epoch(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return loss

    trainer._train_epoch = timed
    return seconds


def past_of_users(interactions):
    """All items of each user but the last one taken, which is tested; by RecBole's numbers.

    A target that the user has had before is in it, as it is in the past of every recommender.
    """
    sequences = {}
    fields = (interactions[name].tolist() for name in ("timestamp", "user_id", "item_id"))
    for _, user, item in sorted(zip(*fields, strict=True)):
        sequences.setdefault(user, []).append(item)
    return {user: set(items[:-1]) for user, items in sequences.items()}


def rank(model, dataset, test, past, top, path):
    """Write each test user's `top` best items, with the past left in and with it left out."""
    model.eval()
    asked = test.dataset.inter_feat
    users = asked["user_id"].tolist()
    targets = asked["item_id"].tolist()
    with torch.no_grad(), path.open("w", encoding="utf-8") as file:
        for start in range(0, len(users), 256):
            rows = asked[slice(start, start + 256)]
            scores = model.full_sort_predict(rows).view(len(rows), -1)
            scores[:, 0] = -torch.inf  # RecBole's padding
            stop = start + len(rows)
            for row, user, target in zip(
                scores, users[start:stop], targets[start:stop], strict=True
            ):
                included = best(row, top, dataset)
                row[list(past[user])] = -torch.inf
                line = {
                    "user": dataset.id2token("user_id", user),
                    "target": dataset.id2token("item_id", target),
                    "past_included": included,
                    "past_excluded": best(row, top, dataset),
                }
                file.write(json.dumps(line) + "\n")


def best(scores, top, dataset):
    """Item names of the `top` greatest finite scores."""
    values, places = scores.topk(min(top, len(scores)))
    return [dataset.id2token("item_id", place) for place in places[values.isfinite()].tolist()]


if __name__ == "__main__":
    main(sys.argv[1])
