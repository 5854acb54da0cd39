"""Both spellings of a pipeline mean the same, and neither accepts what a pass does not have."""

from __future__ import annotations

import dataclasses

import pytest

from qc.ir.errors import InputError
from qc.passes import pipeline
from qc.passes.base import Outcome, Pass, Site
from qc.passes.pipeline import Step, build_pass, format_pipeline, parse_pipeline, steps_of


@dataclasses.dataclass(frozen=True)
class Tint(Pass):
    """Tints the graph."""

    strength: float = 0.5
    layers: tuple[str, ...] = ()
    bits: int | None = None
    deep: bool = False
    format: str = "int4"


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(pipeline._REGISTRY, "tint", lambda: Tint)


def test_the_name_of_a_pass_is_its_class_name_in_kebab_case():
    class FoldScaleIntoNormPass(Pass):
        pass

    assert FoldScaleIntoNormPass.spec_name() == "fold-scale-into-norm"


@pytest.mark.parametrize(
    "text",
    [
        "tint",
        "tint{strength=0.25}",
        "tint{layers=[a,b.c],deep=true}",
        "tint{bits=4,format=uint4:g32,optional=true},tint",
    ],
)
def test_a_pipeline_reads_back_as_it_is_written(text):
    assert format_pipeline(parse_pipeline(text)) == text


def test_a_recipe_and_a_string_give_equal_steps():
    recipe = [{"tint": {"strength": 2, "layers": ["x", "y"], "optional": True}}, "tint"]
    assert steps_of(recipe) == parse_pipeline("tint{strength=2.0,layers=[x,y],optional=true},tint")


def test_none_is_spelled_none():
    assert build_pass("tint", {"bits": "none"}) == Tint()
    assert build_pass("tint", {"bits": "8"}) == Tint(bits=8)


def test_options_at_their_default_are_left_out():
    assert str(Step(Tint(strength=0.5))) == "tint"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ([{"tin": {}}], "found 'tin'"),
        ([{"tint": {"strenght": 1}}], "no option 'strenght'"),
        ([{"tint": {"strength": "strong"}}], "Expected float for tint.strength"),
        ([{"tint": {"bits": True}}], "Expected int for tint.bits"),
        ([{"tint": {}, "other": {}}], "one pass per entry"),
        ([{"tint": [1]}], "options of tint as a mapping"),
        ([{"tint": {"optional": "perhaps"}}], "Expected bool for tint.optional"),
    ],
)
def test_what_a_pass_does_not_have_is_refused_with_what_it_has(recipe, words):
    with pytest.raises(InputError, match=words):
        steps_of(recipe)


def test_all_errors_of_a_recipe_are_reported_together():
    with pytest.raises(InputError) as error:
        steps_of([{"tin": {}}, {"tint": {"x": 1}}])
    assert "'tin'" in str(error.value)
    assert "'x'" in str(error.value)


@pytest.mark.parametrize("text", ["tint{strength=1", "tint{strength}", "tint}"])
def test_malformed_pipelines_are_refused(text):
    with pytest.raises(InputError):
        parse_pipeline(text)


def test_a_skipped_site_needs_a_reason():
    with pytest.raises(ValueError, match="needs a reason"):
        Site("a", Outcome.SKIPPED)
