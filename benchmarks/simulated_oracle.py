"""How learnable the simulated log is: what the truth itself, item neighbours and popularity find on the last day.

`python -m benchmarks.simulated_oracle FOLDER` ranks the whole catalogue for each positive of the last day. The oracle
knows the latent state of the request (the session's intent and the running series), which no model can: it is an upper
bound. `oracle_scores` without requests knows the user's tastes of the day alone. The third oracle knows those, too, but not
which of a topic's new items will do better than others, since no event tells.
"""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import scipy.sparse as sp

from jobs import latent

CUTOFFS = (10, 50)
NEW = 2  # days: the last one, and that of validation


@dataclass(frozen=True)
class Truth:
    """The tables of truth/ on one day as arrays."""

    items: pd.DataFrame
    share_N: np.ndarray  # P(item | topic, day); 0: not there yet
    users: pd.DataFrame  # tastes of the day by user_id
    requests: pd.DataFrame
    topics: int


def read_truth(folder: Path, day: int, topics: int) -> Truth:
    def table(name: str, at_day: bool = True) -> pd.DataFrame:
        data = ds.dataset(folder / "truth" / name, format="parquet", ignore_prefixes=["_", "."])
        return data.to_table(filter=(ds.field("day") == day) if at_day else None).to_pandas()

    items = table("items", at_day=False).sort_values("item_id", ignore_index=True)
    shown = table("exposure")
    share_N = np.zeros(len(items))
    count = np.bincount(shown.topic, minlength=topics)[shown.topic]
    share_N[shown.item_id] = within_topic(shown.place.to_numpy(), count)
    return Truth(items, share_N, table("users").set_index("user_id"), table("requests"), topics)


def within_topic(place: np.ndarray, count: np.ndarray) -> np.ndarray:
    """P(item | topic, day) of items at places (from 0) of topics with `count` items; `latent.zipf_rank` in closed form."""
    b = 1.0 - latent.ZIPF
    share: np.ndarray = ((place + 2.0) ** b - (place + 1.0) ** b) / ((count + 1.0) ** b - 1)
    return share


def unaware_of(truth: Truth, new_N: np.ndarray) -> Truth:
    """The truth but that of the new items (bool [N]), which all have the mean share and quality of those of their topic."""
    items, share_N = truth.items.copy(), truth.share_N.copy()
    means = items.assign(share=share_N)[new_N].groupby("topic")[["share", "quality"]].transform("mean")
    share_N[new_N] = means.share
    items.loc[new_N, "quality"] = means.quality
    return replace(truth, items=items, share_N=share_N)


def taste(truth: Truth, user_ids: np.ndarray) -> np.ndarray:
    """The weight of each topic for each user [R, T]."""
    rows = truth.users.loc[user_ids]
    weight_RT = np.zeros((len(user_ids), truth.topics))
    for core in range(len(latent.CORE)):
        topic_R = np.stack(rows.topics.to_numpy())[:, core]
        weight_RT[np.arange(len(user_ids)), topic_R] += np.stack(rows.weights.to_numpy())[:, core]
    return weight_RT


def liked(truth: Truth, user_ids: np.ndarray) -> np.ndarray:
    """The true probability of a positive [R, N] of each user with each item on the day; NumPy's `World.liked`."""
    favourite_RF = np.stack(truth.users.loc[user_ids].favourites.to_numpy())
    favourite_RN = np.zeros((len(user_ids), len(truth.items)), dtype=bool)
    for column in favourite_RF.T:
        favourite_RN |= column[:, None] == truth.items.author_id.to_numpy()[None, :]
    odds_RN = latent.BIAS + latent.BY_TOPIC * taste(truth, user_ids)[:, truth.items.topic]
    odds_RN += latent.BY_QUALITY * truth.items.quality.to_numpy() + latent.BY_FAVOURITE * favourite_RN
    return 1.0 / (1.0 + np.exp(-odds_RN))


def exposed(truth: Truth, user_ids: np.ndarray, intents: np.ndarray | None = None) -> np.ndarray:
    """The policy's probability [R, N] that a slot outside a series shows the item, before repeats are replaced."""
    edges = (np.arange(truth.topics + 1) / truth.topics) ** (1 / latent.TOPIC_SKEW)
    trend_T = np.diff(edges)
    taste_RT = taste(truth, user_ids)
    if intents is None:
        intent_RT = latent.INTENT_CORE * taste_RT + (1 - latent.INTENT_CORE) * trend_T
    else:
        intent_RT = np.eye(truth.topics)[intents]
    topic_RT = latent.INTENT_SHARE * intent_RT + latent.MIXTURE_SHARE * taste_RT + latent.TREND_SHARE * trend_T
    anywhere = 1 - latent.INTENT_SHARE - latent.MIXTURE_SHARE - latent.TREND_SHARE
    present_N = truth.share_N > 0
    return topic_RT[:, truth.items.topic] * truth.share_N + anywhere * present_N / present_N.sum()


def oracle_scores(truth: Truth, user_ids: np.ndarray, requests: pd.DataFrame | None = None) -> np.ndarray:
    """Scores [R, N] in proportion to P(the next positive is the item). `requests`: rows of truth/requests, one a user id,
    whose intent and series the oracle may know."""
    if requests is None:
        return exposed(truth, user_ids) * liked(truth, user_ids)
    scores_RN = exposed(truth, user_ids, requests.intent.to_numpy()) * liked(truth, user_ids)
    rows = np.flatnonzero(requests.series_item.notna())
    scores_RN *= 1.0 - (requests.series_item.notna().to_numpy() / latent.MEAN_REQUEST)[:, None]
    episodes = requests.series_item.iloc[rows].astype(int)
    scores_RN[rows, episodes] += requests.series_liked.iloc[rows] / latent.MEAN_REQUEST
    return scores_RN


def read_positives(folder: Path) -> pd.DataFrame:
    """user_id, video_id, time_ms, day of the positives in order of time."""
    names = ["user_id", "video_id", "time_ms", "is_click", "is_like", "long_view"]
    log = pd.concat(pd.read_csv(file, usecols=names) for file in sorted(folder.glob("log_standard_*.csv.gz")))
    log = log[(log.is_click + log.is_like + log.long_view) > 0].sort_values(["time_ms", "user_id", "video_id"])
    start = log.time_ms.min() // latent.DAY_MS
    return log.assign(day=log.time_ms // latent.DAY_MS - start)[["user_id", "video_id", "time_ms", "day"]]


def neighbours(train: pd.DataFrame, shape: tuple[int, int]) -> sp.csr_array:
    """Cosine of the items' columns of users."""
    seen = sp.csr_array((np.ones(len(train)), (train.user_id, train.video_id)), shape=shape)
    seen.data[:] = 1.0
    norm = np.sqrt(np.maximum(np.asarray(seen.sum(axis=0)).ravel(), 1.0))
    scaled = seen @ sp.diags_array(1 / norm)
    similar = (scaled.T @ scaled).tolil()
    similar.setdiag(0)
    return similar.tocsr()


def histories(log: pd.DataFrame, test: pd.DataFrame, decay: float, length: int = 50) -> sp.csr_array:
    """Recency weights [R, N] of each test row's positives strictly before it."""
    of_user = {user: (g.time_ms.to_numpy(), g.video_id.to_numpy()) for user, g in log.groupby("user_id")}
    rows, columns, values = [], [], []
    for r, (user, time) in enumerate(zip(test.user_id, test.time_ms, strict=True)):
        times, items = of_user[user]
        recent = items[: np.searchsorted(times, time)][-length:][::-1]
        rows += [r] * len(recent)
        columns += recent.tolist()
        values += (decay ** np.arange(len(recent))).tolist()
    return sp.csr_array((values, (rows, columns)), shape=(len(test), int(log.video_id.max()) + 1))


def ranks(scores_RN: np.ndarray, item_R: np.ndarray) -> np.ndarray:
    """Of each row's item, from 0, the mean one among equal scores [R]."""
    own_R1 = np.take_along_axis(scores_RN, item_R[:, None], axis=1)
    return (scores_RN > own_R1).sum(axis=1) + ((scores_RN == own_R1).sum(axis=1) - 1) / 2


def measure(folder: Path, sample: int = 10_000) -> dict[str, dict[str, float]]:
    """Recall of all test positives and of those of new items, by system."""
    settings = json.loads((folder / "_SIMULATED.json").read_text())["settings"]
    day = settings["days"] - 1
    truth = read_truth(folder, day, settings["topics"])
    new_N = (truth.items.upload_day > day - NEW).to_numpy()
    unaware = unaware_of(truth, new_N)
    positives = read_positives(folder)
    train, test = positives[positives.day < day], positives[positives.day == day]
    test = test.sample(min(sample, len(test)), random_state=0)
    requests = truth.requests.set_index(["user_id", "time_ms"])
    popular = np.bincount(train.video_id, minlength=len(truth.items)).astype(float)
    similar = neighbours(train, (settings["users"], len(truth.items)))
    found: dict[str, list[np.ndarray]] = {}
    for part in np.array_split(np.arange(len(test)), max(1, len(test) // 500)):
        rows = test.iloc[part]
        users, items = rows.user_id.to_numpy(), rows.video_id.to_numpy()
        state = requests.loc[list(zip(users, rows.time_ms, strict=True))]
        tiny = popular * 1e-9  # ties, and users without a history, go by popularity
        systems = {"popularity": np.tile(popular, (len(rows), 1))}
        for decay in (1.0, 0.8, 0.5):
            history = histories(positives[positives.user_id.isin(users)], rows, decay)
            history = sp.csr_array(history, shape=(len(rows), history.shape[1]))
            systems[f"itemknn_{decay}"] = (history @ similar[: history.shape[1]]).toarray() + tiny
        systems["oracle_of_the_day"] = oracle_scores(truth, users)
        systems["oracle_unaware_of_the_new"] = oracle_scores(unaware, users)
        systems["oracle_of_the_request"] = oracle_scores(truth, users, state)
        for name, scores_RN in systems.items():
            found.setdefault(name, []).append(ranks(scores_RN, items))
    kinds = {"": np.ones(len(test), bool), " of new items": new_N[test.video_id]}
    rank_R = {name: np.concatenate(parts) for name, parts in found.items()}
    return {
        name: {
            f"recall@{cutoff}{kind}": float((each_R[rows] < cutoff).mean())
            for kind, rows in kinds.items()
            for cutoff in CUTOFFS
        }
        for name, each_R in rank_R.items()
    }


def main() -> None:
    started = datetime.datetime.now()
    for name, row in measure(Path(sys.argv[1])).items():
        print(f"{name:26s}" + "".join(f"  {metric} {value:.4f}" for metric, value in row.items()))
    print(f"{(datetime.datetime.now() - started).total_seconds():.0f} s")


if __name__ == "__main__":
    main()
