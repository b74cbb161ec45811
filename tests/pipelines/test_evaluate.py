import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.item_memory import FLATNESS, SHARPNESS
from model.lazy_decoder import LazyDecoder
from model.mixed_ranker import MixedRanker
from model.positives import Positives, ScoreRanker
from model.requests import Requests
from pipelines import evaluate
from pipelines.baselines import Fitting, fit_baselines
from pipelines.checkpoints import save_model
from pipelines.evaluation_data import positive_queries, positive_targets
from pipelines.example_roles import role_events
from pipelines.measurement import HISTORY_GROUPS, Measurement, item_groups, measure
from pipelines.ray_tables import replace_days
from pipelines.sampling import Sample
from pipelines.split import Roles, roles_by_user
from pipelines.stage import StageContext
from schemas.calendar import calendar_of
from schemas.config import Config, EvaluateConfig, SplitConfig, TargetConfig
from schemas.errors import ContractViolation
from schemas.feedback import mask_of
from schemas.lineage import EVALUATE, plan
from schemas.model_config import ModelConfig
from schemas.tables import ITEMS as ITEMS_TABLE
from schemas.tables import SEMANTIC_IDS
from tests.model.handmade_requests import LIKED, POSITIVE, SEEN, requests_by_hand
from tests.pipelines.handmade_examples import DAY_US, FIRST_US, Request, examples_of, slices_of

ITEMS = 8
BY_DAY = Roles(*(np.empty(0, np.int64),) * 3, default=(FIRST_US + DAY_US, FIRST_US + 2 * DAY_US))  # a day each
EVERYTHING = Sample(0, np.uint64(2**64 - 1))


@st.composite
def requests_of_days(draw):
    """Slices of requests of three days: train, validation, test."""
    slices = []
    for _ in range(draw(st.integers(0, 6))):
        user, day = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        times = sorted(draw(st.sets(st.integers(0, 50), min_size=1, max_size=3)))
        events = st.lists(st.tuples(st.integers(0, ITEMS - 1), st.sampled_from([LIKED, SEEN])), max_size=3)
        slices.append([Request(user, FIRST_US + day * DAY_US + ts, draw(events)) for ts in times])
    return slices


@settings(max_examples=60, deadline=None)
@given(requests_of_days(), st.sampled_from(["train", "validation", "test"]), st.integers(0, 3))
def test_positive_targets_equal_a_loop_over_requests(slices, role, skipped):
    day = ["train", "validation", "test"].index(role)
    table = slices_of(slices).slice(skipped)  # offsets that do not begin at 0
    found = positive_targets([table, slices_of([])], BY_DAY, role, POSITIVE)
    expected = [
        (request.user, request.ts_us, item)
        for requests in slices[skipped:]
        for request in requests
        for item, feedback in request.targets
        if feedback & POSITIVE and (request.ts_us - FIRST_US) // DAY_US == day
    ]
    assert list(zip(found.user_ids, found.ts_us, found.item_ids, strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(requests_of_days(), st.integers(0, 3))
def test_by_user_the_last_positive_request_tests_and_the_one_before_validates(slices, skipped):
    kept = slices[skipped:]
    roles = roles_by_user([role_events(slices_of(slices).slice(skipped))], POSITIVE)
    times: dict[int, set[int]] = {}
    for request in (request for requests in kept for request in requests):
        if any(feedback & POSITIVE for _, feedback in request.targets):
            times.setdefault(request.user, set()).add(request.ts_us)
    for user, positive in times.items():
        ordered = sorted(positive)
        for role, expected in {
            "test": ordered[-1:] if len(ordered) > 1 else [],
            "validation": ordered[-2:-1] if len(ordered) > 2 else [],
        }.items():
            chosen = roles.select(np.full(len(ordered), user), np.array(ordered), role)
            assert np.array(ordered)[chosen].tolist() == expected


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny steps: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_and_test(poisoned: bool):
    """Two train positives and more a user, a validation one, and test ones that the poison replaces."""
    generator = np.random.default_rng(0)
    rows = []
    for user in range(1, 13):
        items = generator.permutation(ITEMS)
        rows += [Request(user, FIRST_US + place, [(int(item), LIKED)]) for place, item in enumerate(items[:5])]
        rows.append(Request(user, FIRST_US + DAY_US, [(int(items[5]), LIKED)]))
        wanted = [(0, LIKED)] * 3 if poisoned else [(int(items[6]), LIKED), (int(items[7]), SEEN)]
        rows.append(Request(user, FIRST_US + 2 * DAY_US, wanted))
    return examples_of(rows)


def test_no_test_event_reaches_a_fitted_baseline():
    systems = ("popularity", "itemknn", "sasrec", "sasrec_itemknn")
    config = EvaluateConfig(baselines=systems, sasrec_width=8, sasrec_epochs=2, sasrec_batch_tokens=16)
    lists = []
    for poisoned in (False, True):
        tables = [train_and_test(poisoned)]
        rows = positive_targets(tables, BY_DAY, "train", POSITIVE)
        positives = Positives.of(rows.user_ids, rows.ts_us, rows.item_ids, ITEMS)
        validation = [requests_by_hand([[1, 2]], [[3]])]
        fitting = Fitting(positives, validation, POSITIVE, config)
        fitted = fit_baselines(fitting)
        assert tuple(fitted) == systems
        asked = requests_by_hand([[], [4], [2, 5, 1]])
        lists.append({name: (found.chosen, found.system.rank(asked, ITEMS).tolist()) for name, found in fitted.items()})
        test = positive_targets(tables, BY_DAY, "test", POSITIVE)
        assert len(test.item_ids) == (36 if poisoned else 12)
    assert lists[0] == lists[1]


class Scored(ScoreRanker):
    """The same scores whatever the requests."""

    def __init__(self, scores_RN: torch.Tensor) -> None:
        self.scores_RN = scores_RN

    @property
    def num_items(self) -> int:
        return self.scores_RN.shape[1]

    def scores(self, requests: Requests) -> torch.Tensor:
        return self.scores_RN


def test_a_mixed_baseline_adds_evidence_and_needs_both():
    generator = torch.Generator().manual_seed(0)
    logits, shares = torch.randn(3, ITEMS, generator=generator), torch.rand(3, ITEMS, generator=generator)
    shares[1] = 0  # nothing known
    mixed = MixedRanker(Scored(logits), Scored(shares), 2.0, 0.3).scores(requests_by_hand([[1], [2], [3]], [[4]] * 3))
    wanted = logits.softmax(1)
    belief, evidence = (FLATNESS * logits).softmax(1), shares**SHARPNESS / 2
    both = (0.7 * belief + 0.3 * evidence) / (0.7 + 0.3 * evidence.sum(1, keepdim=True))
    wanted[[0, 2]] = both[[0, 2]]
    assert torch.allclose(mixed.exp(), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="must name itemknn and sasrec before sasrec_itemknn"):
        EvaluateConfig(baselines=("sasrec", "sasrec_itemknn", "itemknn"))


def test_only_positive_targets_and_requests_with_one_are_queries():
    requests = requests_by_hand([[1], [2], [3]], [[4, 5], [6], [7, -1]], users=[10, 11, 12])
    requests.target_feedback = torch.tensor([SEEN, LIKED, SEEN, LIKED, LIKED])
    found = positive_queries(requests, POSITIVE)
    assert found.user_ids.tolist() == [10, 12]
    assert found.target_items.tolist() == [5, 7, -1]
    assert found.target_offsets.tolist() == [0, 1, 3]
    assert found.history_items.tolist() == [1, 3]


class Listed:
    """Ranks by a list a user, whatever the batch; items of the history are left out where asked."""

    def __init__(self, lists: dict[int, list[int]]) -> None:
        self.lists = lists

    def rank(self, requests: Requests, k: int, exclude_history: bool = False) -> torch.Tensor:
        rows = []
        for row, user in enumerate(requests.user_ids.tolist()):
            history = requests.history_items[requests.history_offsets[row] : requests.history_offsets[row + 1]].tolist()
            kept = [item for item in self.lists[user] if not (exclude_history and item in history)][:k]
            rows.append(kept + [-1] * (k - len(kept)))
        return torch.tensor(rows)


@st.composite
def measured(draw):
    users = draw(st.integers(2, 5))
    history = draw(st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=8), min_size=users, max_size=users))
    target = st.lists(st.integers(-1, ITEMS - 1), min_size=1, max_size=3)
    targets = draw(st.lists(target, min_size=users, max_size=users))
    lists = {name: [draw(st.permutations(range(ITEMS))) for _ in range(users)] for name in ("model", "popularity")}
    counts = draw(st.lists(st.integers(0, 4), min_size=ITEMS, max_size=ITEMS))
    return history, targets, lists, np.array(counts), draw(st.booleans())


@settings(max_examples=40, deadline=None)
@given(measured(), st.integers(1, 3))
def test_the_report_equals_a_count_by_hand_whatever_the_batches(case, batch):
    history, targets, lists, counts, masked = case
    config = EvaluateConfig(cutoffs=(2, 5), deep_cutoff=7, bootstrap=20, mask_history=masked)
    systems = {name: Listed(dict(enumerate(orders))) for name, orders in lists.items()}
    measurement = Measurement(systems, config, counts, np.arange(ITEMS) * 100, POSITIVE, EVERYTHING)
    batches = [
        requests_by_hand(
            history[start : start + batch], targets[start : start + batch], users=range(len(history))[start:][:batch]
        )
        for start in range(0, len(history), batch)
    ]
    report = measure(measurement, batches)
    assert report["queries"] == len(targets) and report["targets"] == sum(map(len, targets))
    groups = item_groups(counts)
    for name, orders in lists.items():
        places = []
        for order, seen, wanted in zip(orders, history, targets, strict=True):
            shown = [item for item in order if not (masked and item in seen)]
            places += [(shown.index(item) if item in shown else math.inf, item, len(seen)) for item in wanted]
        cells = report["metrics"][name]
        for k in (2, 5, 7):
            assert cells[f"recall@{k}"]["value"] == pytest.approx(np.mean([place < k for place, _, _ in places]))
        gains = [1 / math.log2(place + 2) if place < 5 else 0 for place, _, _ in places]
        assert cells["ndcg@5"]["value"] == pytest.approx(np.mean(gains))
        by_kind = report["breakdowns"]
        for code, group in enumerate(("head", "tail", "cold")):
            inside = [place < 10 for place, item, _ in places if (groups[item] if item >= 0 else 2) == code]
            assert by_kind["item"][group]["targets"] == len(inside)
            assert by_kind["item"][group]["recall@10"][name] == (pytest.approx(np.mean(inside)) if inside else None)
        for group, (low, high) in HISTORY_GROUPS.items():
            inside = [place < 10 for place, _, seen in places if low <= seen <= high]
            assert by_kind["history"][group]["recall@10"][name] == (pytest.approx(np.mean(inside)) if inside else None)
        shown = {i for order, seen in zip(orders, history, strict=True) for i in order if not (masked and i in seen)}
        assert report["coverage"][name] == len(shown) / ITEMS
    gap = report["differences"]["popularity"]["recall@5"]
    values = [report["metrics"][name]["recall@5"]["value"] for name in lists]
    assert gap["value"] == pytest.approx(values[0] - values[1]) and gap["low"] <= gap["high"]


def test_samples_show_ids_of_the_catalogue_and_what_was_hit():
    systems = {"model": Listed({5: [1, 2, 3, 4, 6, 7], 6: [0, 2, 1]})}
    config = EvaluateConfig(bootstrap=10)
    measurement = Measurement(systems, config, np.ones(ITEMS, int), np.arange(ITEMS) + 100, POSITIVE, EVERYTHING)
    report = measure(measurement, [requests_by_hand([[0, 7, 6, 5], []], [[3], [5]], users=[5, 6])])
    assert report["samples"] == [
        {"user_id": 5, "history": [107, 106, 105], "items": [101, 102, 103, 104, 106], "hits": [0, 0, 1, 0, 0]},
        {"user_id": 6, "history": [], "items": [100, 102, 101], "hits": [0, 0, 0]},
    ]


def test_equal_systems_differ_by_nothing():
    lists = {user: [user % ITEMS] for user in range(30)}
    systems = {"model": Listed(lists), "sasrec": Listed(dict(lists))}
    measurement = Measurement(systems, EvaluateConfig(), np.ones(ITEMS, int), np.arange(ITEMS), POSITIVE, EVERYTHING)
    report = measure(measurement, [requests_by_hand([[]] * 30, [[user % 3] for user in range(30)])])
    assert set(report["differences"]["sasrec"]["recall@10"].values()) == {0.0}
    cell = report["metrics"]["model"]["recall@10"]
    assert cell["low"] < cell["value"] < cell["high"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).map(np.array))
def test_head_items_make_half_of_the_positives(counts):
    groups = item_groups(counts)
    assert ((groups == 2) == (counts == 0)).all()
    head = counts[groups == 0]
    assert head.sum() * 2 >= counts.sum()
    if head.size:
        assert (head.sum() - head.min()) * 2 < counts.sum()
        assert head.min() >= counts[groups == 1].max(initial=0)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.tuples(st.integers(-9, 99), st.integers(0, 10**12)), max_size=40), st.integers(0, 45), st.integers(0, 9))
def test_a_sample_has_its_size_and_depends_on_no_order(pairs, size, seed):
    users, times = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
    kept = Sample.of(users, times, size, seed).keeps(users, times)
    assert kept.sum() == min(size, len(pairs))
    order = np.random.default_rng(0).permutation(len(pairs))
    shuffled = Sample.of(users[order], times[order], size, seed).keeps(users[order], times[order])
    assert (shuffled == kept[order]).all()
    whole = Sample.of(users, times, size, seed, whole_users=True).keeps(users, times)
    assert whole.sum() >= min(size, len(pairs))
    assert not set(users[whole].tolist()) & set(users[~whole].tolist())


def test_another_seed_gives_another_sample():
    users, times = np.arange(1000), np.zeros(1000, np.int64)
    first, second = (Sample.of(users, times, 100, seed).keeps(users, times) for seed in (0, 1))
    assert 0 < (first & second).sum() < 40


def days_of_a_small_log():
    """Five days of 12 users with one request a day, whose history is what came before."""
    generator = np.random.default_rng(1)
    requests = []
    for user in range(1, 13):
        history: list[tuple[int, int]] = []
        for day in range(5):
            targets = [(int(item), int(generator.integers(2))) for item in generator.integers(0, ITEMS, 2)]
            requests.append(Request(user, FIRST_US + day * DAY_US + user, targets, tuple(history)))
            history += targets
    return requests


@pytest.fixture
def small_lake(lake):
    """training_examples of the small log; codes, items; ITEMS - 1 is unknown to the catalogue."""
    requests = days_of_a_small_log()
    days = sorted({request.day for request in requests})
    identities = dict.fromkeys(days, "made")
    replace_days(lake, "training_examples", examples_of(requests), identities)
    write_codes(lake, days[2])
    rows = [{"item_id": i, "date": days[0], "tags": [], "attributes": []} for i in range(ITEMS - 1)]
    replace_days(lake, "items", pa.Table.from_pylist(rows, schema=ITEMS_TABLE.schema), identities)
    return lake


def write_codes(lake, fit_day):
    days = lake.identities("training_examples")
    codes = [
        {"item_id": i, "date": fit_day, "codes": [i % 2, i // 2 % 2, i // 4], "codebook_version": "book", "rank": 0}
        for i in range(ITEMS - 1)
    ]
    replace_days(lake, "semantic_ids", pa.Table.from_pylist(codes, schema=SEMANTIC_IDS.schema), dict.fromkeys(days, "made"))
    lake.write_manifest("tokenize", "book", {"levels": 3, "codes": 2})


def context_of(lake, engines, config):
    calendar = calendar_of(lake.identities("training_examples"), config.split)
    train = lake.artifact("train", "made")
    torch.manual_seed(0)
    save_model(train, LazyDecoder(config.model, (2, 2, 2), mask_of(config.targets.positive)), {"codebook_version": "book"})
    lake.write_manifest("align", "made", {"model": {"stage": "train", "identity": "made"}})
    pins = {name: lake.version(name) for name in ("training_examples", "semantic_ids", "items")}
    planned = plan(EVALUATE, config, lake, calendar, pinned={"align": "made"})
    return StageContext(config, lake, calendar, planned, engines, pins, lambda line: None)


CONFIG = Config(
    model=ModelConfig(d_model=16, layers=1, heads=2, g_kv=2, embed_dim=4, hash_buckets=10),
    evaluate=EvaluateConfig(
        cutoffs=(2, 5),
        deep_cutoff=6,
        deep_sample=4,
        beam=8,
        bootstrap=50,
        sasrec_width=8,
        sasrec_epochs=1,
        batch_requests=5,
    ),
)


def test_the_stage_measures_every_test_positive_by_every_system(small_lake, engines):
    result = evaluate.run(context_of(small_lake, engines, CONFIG))
    tested = [r for r in days_of_a_small_log() if r.ts_us >= FIRST_US + 4 * DAY_US]
    positive = [sum(feedback & POSITIVE for _, feedback in request.targets) for request in tested]
    manifest = result.manifest
    assert manifest["targets"] == sum(positive)
    assert manifest["queries"] == sum(count > 0 for count in positive)
    assert set(manifest["metrics"]) == {"model", "popularity", "itemknn", "sasrec"}
    assert set(manifest["metrics"]["model"]) == {"recall@2", "recall@5", "ndcg@2", "ndcg@5", "recall@6"}
    assert set(manifest["differences"]) == set(manifest["chosen"]) == {"popularity", "itemknn", "sasrec"}
    assert manifest["deep"]["queries"] == len(manifest["samples"]) == 4
    assert 0 < manifest["legality"] <= 1  # 7 of 8 code triples are items
    assert result.metrics["model.recall@5"] == manifest["metrics"]["model"]["recall@5"]["value"]
    assert json.loads(json.dumps(manifest)) == manifest
    assert set(result.figures) == {"recall", "ndcg"}


def test_by_user_every_user_with_two_positive_requests_is_tested_once(small_lake, engines):
    config = dataclasses.replace(CONFIG, split=SplitConfig(by="user"))
    write_codes(small_lake, max(small_lake.identities("training_examples")))
    context = context_of(small_lake, engines, config)
    context.engines.ray()
    data = evaluate.evaluation_data(context)
    times: dict[int, list[int]] = {}
    for request in days_of_a_small_log():
        if any(feedback & POSITIVE for _, feedback in request.targets):
            times.setdefault(request.user, []).append(request.ts_us)
    for role, place in {"test": -1, "validation": -2}.items():
        expected = {(user, sorted(of)[place]) for user, of in times.items() if len(of) > -place}
        batches = list(data.queries(role))
        found = torch.cat([torch.stack([batch.user_ids, batch.ts_us], 1) for batch in batches]).tolist()
        assert sorted(map(tuple, found)) == sorted(expected)
        assert set(zip(*data.targets(role).requests(), strict=True)) == expected
    fitted = data.train_positives()
    trained = [r for r in days_of_a_small_log() if r.ts_us not in sorted(times.get(r.user, []))[1:][-2:]]
    assert len(fitted.items) == sum(f & POSITIVE and i < ITEMS - 1 for r in trained for i, f in r.targets)


def test_a_model_of_another_codebook_and_an_empty_test_are_refused(small_lake, engines):
    context = context_of(small_lake, engines, CONFIG)
    with pytest.raises(ContractViolation, match=r"learned codebook book, whose codes mean nothing in codebook other"):
        catalogue = dataclasses.replace(evaluate.evaluation_data(context).catalogue, codebook_version="other")
        evaluate.load_ranker(context, catalogue)
    nothing = dataclasses.replace(CONFIG, targets=TargetConfig(positive=("hate",)))
    with pytest.raises(ContractViolation, match=r"No request of the test has a positive target"):
        evaluate.run(context_of(small_lake, engines, nothing))
