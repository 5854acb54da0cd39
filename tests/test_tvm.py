"""The TVM target: libraries that compute what ONNX Runtime does, and that refuse what is not theirs."""

from __future__ import annotations

import ctypes
import json
import platform
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qc
from qc.backends.inputs import text_inputs
from qc.backends.ort.backend import OrtCpu
from qc.backends.reference import ModelRunner
from qc.backends.sampling import Sampling
from qc.backends.target import backend_for
from qc.backends.tvm import toolchain
from qc.backends.tvm.backend import TvmCpu
from qc.backends.tvm.runner import open_runner
from qc.frontend import load
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.text import parse
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step, parse_pipeline
from qc.progress import Progress

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

PROMPT = [3, 17, 200, 5, 1000, 42, 7]

ALLOWED = {
    "calloc", "close", "expf", "free", "fstat", "__fxstat", "madvise", "malloc", "memcpy", "memset", "mmap", "munmap",
    "open", "open64", "fstat64", "posix_memalign", "syscall", "__stack_chk_fail", "erff", "tanhf", "powf", "logf",
    "sqrtf",
    *(f"pthread_{n}" for n in ("create", "join", "mutex_init", "mutex_lock", "mutex_unlock", "mutex_destroy",
                               "cond_init", "cond_wait", "cond_signal", "cond_broadcast", "cond_destroy")),
}  # fmt: skip
"""Of libc, libm and pthread, and nothing else."""


@pytest.fixture(scope="session")
def quantized() -> Model:
    """tiny-llama with 4-bit weights."""
    steps = [
        *(Step(p, optional=True) for p in canonicalize_passes()),
        *parse_pipeline("quantize-weights{format=uint4,group=32}"),
    ]
    return Model.of(PassManager(steps, verify=False).run(load("builtin:tiny-llama"))[0])


@pytest.fixture(scope="session")
def emitted(quantized: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One quantization, emitted for ONNX Runtime and as a library, both exact."""
    made = {}
    for name, backend in (("ort", OrtCpu(accuracy_level=0)), ("tvm", TvmCpu(exact=True))):
        made[name] = tmp_path_factory.mktemp("emitted")
        emit(quantized, backend, made[name])
    return made


def emit(model: Model, backend: OrtCpu | TvmCpu, directory: Path) -> None:
    lowered, _ = PassManager(list(backend.lowering()), stage="lowering", verify=False).run(model.clone())
    backend.emit(Model.of(lowered), directory)


def example(root: Path) -> str:
    """The C program of the documentation."""
    text = (root / "docs/tvm.md").read_text("utf-8")
    return re.findall(r"^```c\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0]


def test_greedy_tokens_are_those_of_onnx_runtime_with_the_same_weights(emitted: dict[str, Path]) -> None:
    expected = list(OrtCpu().open(emitted["ort"], threads=1).generate(PROMPT, 24))
    assert list(open_runner(emitted["tvm"], threads=1).generate(PROMPT, 24)) == expected


def test_a_run_with_a_cache_is_that_of_onnx_runtime(emitted: dict[str, Path]) -> None:
    """Two rows of which one is padded on the right, behind nothing; then one row behind seven tokens."""
    ours, theirs = open_runner(emitted["tvm"], threads=1), OrtCpu().open(emitted["ort"], threads=1)
    first = text_inputs(theirs.signature, np.array([PROMPT, PROMPT[::-1]]))
    results = [r.run(first) for r in (ours, theirs)]
    for name, value in results[1].items():
        np.testing.assert_allclose(results[0][name], value, rtol=1e-4, atol=1e-4)
    second = text_inputs(theirs.signature, np.array([[9], [11]]), past=len(PROMPT))
    for past, present in theirs.signature.caches:
        second[past.name] = results[1][present.name]
    for name, value in theirs.run(second).items():
        np.testing.assert_allclose(ours.run(second)[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kv", "tolerance"), [("float16", 1e-3), ("uint8", 0.02), ("uint4", 0.3)])
def test_a_narrow_cache_holds_nearly_the_same(
    quantized: Model, emitted: dict[str, Path], tmp_path: Path, kv: str, tolerance: float
) -> None:
    """Logits of a text in one piece, and of its end behind a cache of its beginning."""
    emit(quantized, TvmCpu.parse(f"float,kv={kv}"), tmp_path)
    narrow, wide = open_runner(tmp_path, threads=1), open_runner(emitted["tvm"], threads=1)
    whole, begin, end = (text_inputs(wide.signature, np.array([p]), past=n) for p, n in
                         ((PROMPT, 0), (PROMPT[:4], 0), (PROMPT[4:], 4)))  # fmt: skip
    expected, begun = wide.run(whole)["logits"][0, -1], narrow.run(begin)
    end |= {past.name: begun[present.name] for past, present in narrow.signature.caches}
    for given in (whole, end):
        error = np.linalg.norm(narrow.run(given)["logits"][0, -1] - expected) / np.linalg.norm(expected)
        assert 0 < error < tolerance


def test_a_narrow_cache_that_there_is_not_is_refused(tmp_path: Path) -> None:
    model = parse("f (float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    with pytest.raises(UnsupportedError, match="Leave out kv="):
        TvmCpu(kv="uint8").emit(model, tmp_path)


def test_sampling_is_greedy_at_temperature_zero_and_repeats_with_its_seed(emitted: dict[str, Path]) -> None:
    runner = open_runner(emitted["tvm"], threads=1)
    greedy = list(runner.generate(PROMPT, 12))
    for sampling in (Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=1e-6)):
        assert list(runner.generate(PROMPT, 12, sampling=sampling)) == greedy
    one, two, again = (
        list(runner.generate(PROMPT, 12, sampling=Sampling(top_k=50, top_p=0.9, seed=seed))) for seed in (1, 2, 1)
    )
    assert one == again != two


def test_the_library_draws_from_the_distribution_that_we_draw_from(emitted: dict[str, Path]) -> None:
    runner = open_runner(emitted["tvm"], threads=1)
    logits = runner.run(text_inputs(runner.signature, np.array([PROMPT])))["logits"][0, -1]
    sampling = Sampling(temperature=0.7, top_k=9, top_p=0.8)
    tokens, probabilities = sampling.distribution(logits)
    drawn = [next(runner.generate(PROMPT, 1, sampling=replace(sampling, seed=seed))) for seed in range(300)]
    assert set(drawn) <= set(tokens.tolist())
    found = np.array([drawn.count(token) for token in tokens]) / len(drawn)
    np.testing.assert_allclose(found, probabilities, atol=0.1)


def test_several_threads_and_parts_of_a_prompt_change_nothing(emitted: dict[str, Path]) -> None:
    one, two = (open_runner(emitted["tvm"], threads=n) for n in (1, 3))
    prompt = list(np.random.default_rng(0).integers(0, 4096, 700))  # longer than what is computed at once
    assert list(one.generate(prompt, 4)) == list(two.generate(prompt, 4))


def behind(model: Model, body: str) -> Model:
    """A decoder whose logits pass through a body, which is written in terms of `x` and yields `y`, on their way out."""
    model = model.clone()
    (number,) = (i for i, v in enumerate(model.graph.outputs) if v.name == "logits")
    head = model.graph.outputs[number]
    more = parse(f"f (float[b,s,{head.shape[-1]}] x) => (float[b,s,{head.shape[-1]}] y) {{ {body} }}").graph
    logits, given = more.outputs.pop(), more.inputs[0]
    logits.shape = head.shape
    logits.metadata_props.update(head.metadata_props)
    head.metadata_props.clear()
    head.name, logits.name = "of_the_head", "logits"
    given.replace_all_uses_with(head)
    nodes = list(more)
    more.remove(nodes)
    model.graph.extend(nodes)
    model.graph.outputs[number] = logits
    return Model.of(model)


CAPPED = """
    cap = Constant <value_float = 30.0> ()
    bias = Constant <value = float[1, 1] {0.25}> ()
    some = Div (x, cap)
    flat = Tanh (some)
    wide = Mul (cap, flat)
    same = Identity (wide)
    y = Add (same, bias)
"""


@pytest.mark.parametrize(("body", "whole"), [(CAPPED, False), ("y = Softmax (x)", True)])
def test_of_logits_that_pass_through_more_than_a_product_the_last_row_is_kept(
    quantized: Model, emitted: dict[str, Path], tmp_path: Path, body: str, whole: bool
) -> None:
    """Of a bias, a scale or a soft cap; else a prompt of a hundred tokens needs room for a hundred rows."""
    emit(behind(quantized, body), TvmCpu(exact=True), tmp_path)
    prompt = PROMPT * 15
    ours, theirs = (open_runner(d, threads=1) for d in (tmp_path, emitted["tvm"]))
    assert list(ours.generate(prompt, 8)) == list(theirs.generate(prompt, 8))
    reference = ModelRunner(behind(quantized, body))
    given = text_inputs(reference.signature, np.array([PROMPT, PROMPT[::-1]]))
    np.testing.assert_allclose(ours.run(given)["logits"], reference.run(given)["logits"], rtol=1e-4, atol=1e-4)
    a_prompt = 4 * 512 * 4096
    assert (memory_of(tmp_path) - memory_of(emitted["tvm"]) > a_prompt // 2) == whole


def test_a_decoder_that_yields_more_than_logits_leaves_the_loop_to_the_caller(
    quantized: Model, emitted: dict[str, Path], tmp_path: Path
) -> None:
    """`qc_feed` would have no array for the rest, and leave out rows of logits that it is computed of."""
    model = behind(quantized, "y = Identity (x)")
    logits = next(v for v in model.graph.outputs if v.name == "logits")
    more = ir.node("Relu", [logits])
    more.outputs[0].name, more.outputs[0].type, more.outputs[0].shape = "more", logits.type, logits.shape
    model.graph.append(more)
    model.graph.outputs.append(more.outputs[0])
    emit(Model.of(model), TvmCpu(exact=True), tmp_path)
    assert "qc_feed" not in (tmp_path / "model.h").read_text()
    expected = list(open_runner(emitted["tvm"], threads=1).generate(PROMPT, 8))
    assert list(open_runner(tmp_path, threads=1).generate(PROMPT, 8)) == expected


def memory_of(directory: Path) -> int:
    """Bytes of an instance at default limits."""
    c = ctypes.CDLL(str(directory / "libmodel.so"))
    model, instance = ctypes.c_void_p(), ctypes.c_void_p()
    assert c.qc_open(str(directory / "model.weights").encode(), ctypes.byref(model)) == 0
    assert c.qc_create(model, None, None, ctypes.byref(instance)) == 0
    c.qc_memory.restype = ctypes.c_size_t
    found = c.qc_memory(instance)
    c.qc_destroy(instance)
    c.qc_close(model)
    return found


def test_ten_instances_in_ten_threads_agree(emitted: dict[str, Path]) -> None:
    runners = [open_runner(emitted["tvm"], threads=1) for _ in range(10)]
    found: list[list[int]] = [[] for _ in runners]

    def generate(i: int) -> None:
        found[i] = list(runners[i].generate(PROMPT, 8))

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 10
    assert len(found[0]) == 8


@pytest.mark.parametrize("damage", ["cut", "longer", "bit", "header", "swapped", "empty"])
def test_a_damaged_weights_file_is_refused(emitted: dict[str, Path], tmp_path: Path, damage: str) -> None:
    shutil.copytree(emitted["tvm"], tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.weights"
    content = bytearray(weights.read_bytes())
    match damage:
        case "cut":
            content = content[:-1]
        case "longer":
            content += b"0"
        case "bit":
            content[len(content) // 2] ^= 1
        case "header":
            content[20] ^= 1
        case "swapped":
            content[64:8256], content[8256:16448] = content[8256:16448], content[64:8256]
        case "empty":
            content = bytearray()
    weights.write_bytes(content)
    with pytest.raises(InputError, match="cut short, changed, or of another model"):
        open_runner(tmp_path)


def test_facts_of_another_version_are_refused(emitted: dict[str, Path], tmp_path: Path) -> None:
    facts = json.loads((emitted["tvm"] / "model.json").read_text("utf-8"))
    del facts["cells"]
    (tmp_path / "model.json").write_text(json.dumps(facts), "utf-8")
    with pytest.raises(InputError, match=r"'cells'.*compile it again"):
        open_runner(tmp_path)


def test_facts_of_another_model_are_refused(emitted: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(emitted["tvm"], tmp_path, dirs_exist_ok=True)
    facts = json.loads((tmp_path / "model.json").read_text("utf-8"))
    (tmp_path / "model.json").write_text(json.dumps(facts | {"model": "0" * 16}), "utf-8")
    with pytest.raises(InputError, match=r"is of another model than model\.weights"):
        open_runner(tmp_path)


def test_a_cache_of_kernels_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QC_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set QC_CACHE to another directory"):
        toolchain.cache_directory()


@pytest.mark.parametrize("token", [4096, -1])
def test_a_token_outside_of_the_vocabulary_is_refused(emitted: dict[str, Path], token: int) -> None:
    runner = open_runner(emitted["tvm"], threads=1)
    with pytest.raises(InputError, match="outside of its table"):
        list(runner.generate([token], 1))


@pytest.mark.parametrize("check", [["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []])
def test_the_example_of_the_documentation_runs(
    emitted: dict[str, Path], root: Path, tmp_path: Path, check: list[str]
) -> None:
    """Also with the generated C file, its memory and arithmetic checked; its kernels are as they are."""
    directory = emitted["tvm"]
    (tmp_path / "example.c").write_text(example(root))
    files = [directory / "libmodel.a"]
    if check:
        subprocess.run(["ar", "x", directory / "libmodel.a"], cwd=tmp_path, check=True)
        (tmp_path / "model.o").unlink()
        files = [directory / "model.c", *sorted(tmp_path.glob("*.o"))]
    command = ["cc", *check, "-Wall", "-Wextra", "-Werror", "-I", directory, tmp_path / "example.c", *files, "-lm"]
    subprocess.run([*command, "-o", tmp_path / "example"], check=True)
    done = subprocess.run(
        [tmp_path / "example", directory / "model.weights"], capture_output=True, text=True, check=True
    )
    expected = list(open_runner(directory, threads=1).generate([3, 17, 200, 5, 1000], 8))
    assert list(map(int, done.stdout.split())) == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="valgrind checks the level x86-64")
def test_a_library_and_its_kernels_touch_no_memory_but_theirs(quantized: Model, root: Path, tmp_path: Path) -> None:
    """Valgrind emulates AVX2 and nothing beyond it: the lowest level stands for all, for they are one source."""
    emit(quantized, TvmCpu("x86-64"), tmp_path)
    (tmp_path / "example.c").write_text(example(root))
    command = ["cc", "-g", "-I", tmp_path, tmp_path / "example.c", tmp_path / "libmodel.a", "-lm", "-o"]
    subprocess.run([*command, tmp_path / "example"], check=True)
    checker = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full"]
    done = subprocess.run(
        [*checker, tmp_path / "example", tmp_path / "model.weights"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = list(open_runner(tmp_path, threads=1).generate([3, 17, 200, 5, 1000], 8))
    assert list(map(int, done.stdout.split())) == expected


def test_a_library_needs_libc_libm_and_threads_only(emitted: dict[str, Path]) -> None:
    lines = subprocess.run(
        ["nm", "-D", "--undefined-only", emitted["tvm"] / "libmodel.so"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    wanted = {line.split()[-1].partition("@")[0] for line in lines if line.split()[-2] == "U"}
    assert wanted <= ALLOWED
    assert (emitted["tvm"] / "libmodel.so").stat().st_size <= 150_000


def test_a_pair_of_packages_that_crashes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}
    monkeypatch.setattr(toolchain.importlib.metadata, "version", versions.__getitem__)
    with pytest.raises(UnsupportedError, match=r"apache-tvm-ffi 0\.1\.15\.post2.*crash"):
        toolchain.check_versions()


def test_an_operator_without_a_kernel_is_named(tmp_path: Path) -> None:
    model = parse("f (float[2,3,4,4] x) => (float[2,3] y) { y = Det (x) }")
    with pytest.raises(UnsupportedError, match="no kernel for Det"):
        TvmCpu().emit(model, tmp_path)


@pytest.mark.parametrize("lacks", ["a kernel", "a tool"])
def test_what_will_fail_is_refused_before_passes_take_their_time(
    lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []

    class Stages(Progress):
        def stage(self, name: str) -> None:
            stages.append(name)

    operator = "Identity" if lacks == "a tool" else "Det"
    model = parse(f"f (float[n,3,4,4] x) => (float y) {{ z = Relu (x)  y = {operator} (z) }}")
    if lacks == "a tool":
        monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"no kernel for Det|Expected the tool cc, found none"):
        qc.compile(model, tmp_path / "out", recipe="w4", target="tvm-cpu", progress=Stages())
    assert "recipe" not in stages


def test_a_library_that_takes_the_place_of_a_loaded_one_is_loaded_itself(tmp_path: Path) -> None:
    x, runners = np.array([[-4.0, 9.0]], np.float32), []
    for operator in ("Relu", "Abs"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        TvmCpu().emit(parse(f"f (float[1,2] x) => (float[1,2] y) {{ y = {operator} (x) }}"), tmp_path / "out")
        runners.append(open_runner(tmp_path / "out", threads=1))
    assert [r.run({"x": x})["y"].tolist() for r in runners] == [[[0.0, 9.0]], [[4.0, 9.0]]]


def test_a_model_whose_sizes_are_all_fixed_runs(tmp_path: Path) -> None:
    model = parse("f (float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    TvmCpu().emit(model, tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 3), np.float32)
    np.testing.assert_array_equal(open_runner(tmp_path, threads=1).run({"x": x})["y"], np.maximum(x, 0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [("sse9", "instruction-set level"), ("avx2,avx512vnni", "instruction-set level"), ("kv=int5", "cache of float32")],
)
def test_an_unknown_level_or_cache_is_refused(options: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        backend_for(f"tvm-cpu:{options}")
