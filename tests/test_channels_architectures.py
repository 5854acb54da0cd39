"""On every architecture: whatever the groups admit keeps the function, and every product is covered or explained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models are exported by torch and run by its executor")
pytest.importorskip("transformers", reason="the models are those of transformers")

from architectures import canonical
from channel_actions import NAMES, difference, random_action, run
from tiny_models import ARCHITECTURES

from qc.ir.channels import find_groups
from qc.ir.model import Model
from qc.ir.store import Store
from qc.passes.base import Outcome
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline
from qc.passes.transform.actions import Merge, Split
from qc.passes.transform.fold import fold

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings of torch are not ours


def act_everywhere(model: Model, action: str, dtype: type[np.floating]) -> int:
    """Folds a random action of that name into every group that admits it, once per family where it acts on families."""
    rng = np.random.default_rng(NAMES.index(action))
    store, count, families = Store(), 0, set()
    for number in range(len(find_groups(model))):
        group = find_groups(model)[number]
        if action not in group.admits or (action in ("permute", "orthogonal", "split") and group.family.id in families):
            continue
        families.add(group.family.id)
        result = fold(model, group, random_action(group, action, rng), store, dtype=dtype)
        assert not result.added
        count += 1
    return count


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_admitted_action_on_every_group_keeps_the_function(name: str, models: Path) -> None:
    original = canonical(name, models)
    expected = run(original)
    counts = {}
    for action in NAMES:
        model = original.clone()
        counts[action] = act_everywhere(model, action, np.float64)
        assert difference(expected, run(model)) < 1e-10, action
    assert counts["permute"]
    assert counts["scale"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_actions_together_hold_in_float32(name: str, models: Path) -> None:
    original = canonical(name, models)
    expected = run(original, "float32")
    for action in NAMES:
        model = original.clone()
        act_everywhere(model, action, np.float32)
        assert difference(expected, run(model, "float32")) < 1e-4, action


def test_merging_the_copies_that_a_split_made_keeps_the_function(models: Path) -> None:
    model = canonical("mobilenetv2", models)
    expected, rng, store, count = run(model), np.random.default_rng(0), Store(), 0
    for number in range(len(find_groups(model))):
        group = find_groups(model)[number]
        if not {"split", "merge"} <= group.admits:
            continue
        copies = Split(rng.integers(1, 4, group.width))
        fold(model, group, copies, store, dtype=np.float64)
        fold(model, find_groups(model)[number], Merge(copies.sources), store, dtype=np.float64)
        count += 1
    assert count == 7
    assert difference(expected, run(model)) < 1e-10


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_rotations_hold_with_all_that_run_additionally(name: str, models: Path) -> None:
    pipeline = "rotate{online-hidden=true,online-heads=true,online-keys=true}"
    _, (report,) = PassManager(parse_pipeline(pipeline)).run(canonical(name, models))  # the manager compares
    assert report.differences
    reasons = {s.reason.partition(" forbids")[0] for s in report.sites if s.outcome is Outcome.SKIPPED}
    assert reasons <= {"input", "Pad"}, "what admits no rotation is rotated at run time, but for what the caller gives"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_product_is_scalable_or_its_obstacle_is_named(name: str, models: Path) -> None:
    coverage = find_groups(canonical(name, models)).coverage()
    print(name, f"{coverage['scalable']:.1%}", coverage["by_operator"])
    assert coverage["explained"] >= 0.95


def test_the_groups_of_a_gated_decoder_with_experts(models: Path) -> None:
    groups = find_groups(canonical("mixtral", models))
    readers = {u.name.rpartition("layers.")[2] for g in groups if g.kind == "normalized" for u in g.consumers}
    assert any("block_sparse_moe.gate" in r for r in readers), "the router reads the norm's output"
    assert sum("experts" in r for r in readers) == 8
    assert all("scale" in g.admits for g in groups if g.kind in ("normalized", "value", "key"))
