"""`nunchaku-py tune`: what it measures of a checkpoint, what it says and keeps; on kernels that the interpreter runs,
timed by a clock that prefers the second configuration."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import nunchaku_py as nq
from nunchaku_py import cli, ops
from nunchaku_py.commands import tune_requests
from nunchaku_py.site import Site
from tests.checks import QUICK
from tests.tiny import MODELS

pytest.importorskip("triton")
from nunchaku_py.kernels import config, tuner, tuning, tuning_cases  # noqa: E402
from tests.triton.conftest import taken_for_gpu  # noqa: E402

CPU = torch.device("cpu")
TUNE = ("tune", "--device", "cpu", "--rows", "5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of FLUX, quantized."""
    made, _ = MODELS["flux"]()
    nq.quantize(made, recipe=QUICK)
    folder = tmp_path_factory.mktemp("tune") / "model"
    nq.save(made, folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "cache"))
    monkeypatch.delenv(tuning.ENVIRONMENT, raising=False)
    config.forget()
    yield tmp_path / "cache/tuning"
    config.forget()


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken_for_gpu(monkeypatch, (8, 9))

    class Clock:
        """The configuration that is tried second is twice as fast as the first."""

        def __init__(self) -> None:
            self.tried = 0

        def sets(self, nbytes: int) -> int:
            return 1

        def turn(self, run: tuner.Run, sets: int) -> tuner.Turn:
            self.tried += 1
            took = {1: 2e-3, 2: 1e-3}.get(self.tried, 3e-3)
            return lambda: took

    monkeypatch.setattr(tuner, "GraphTimer", Clock)
    monkeypatch.setattr(tuner, "BEST", 2)


def run(*argv: object) -> int:
    return cli.main([str(arg) for arg in argv])


# ----------------------------------------------------------------------------------------------------- what it measures
def test_a_checkpoints_linears_are_known_from_its_headers(model: Path) -> None:
    linears = {linear.name: linear for linear in tune_requests.stored_linears(model)}
    loaded = nq.load(model)
    for name, linear in linears.items():
        module = loaded.get_submodule(name)
        assert (linear.site, linear.n, linear.k) == (module.site, module.rows_out, module.rows_in)
    assert len(linears) == sum(hasattr(module, "rows_in") for module in loaded.modules())


def test_attention_is_requested_as_it_is_launched(model: Path, as_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of heads that the configuration tells, and the kernel takes."""
    from nunchaku_py.kernels import attention, attention_config

    assert tune_requests.stored_attention(model) == [tune_requests.Attention(2, 64)]
    monkeypatch.setattr(tune_requests, "HEADS_OF", (128,))
    assert tune_requests.stored_attention(model) == []
    request, _ = tune_requests.attention_requests(tune_requests.flux_attention(), (64, 300), CPU)
    case = tuning_cases.case_of(*request)
    q, k, v, spec = case.operands(CPU)
    asked = []
    monkeypatch.setattr(attention, "choose", lambda *found: asked.append(found) or attention_config.CONFIGS[-1])
    monkeypatch.setattr(attention.launch, "launch", lambda *args, **constants: None)
    with nq.backend("triton"):
        ops.OPS[case.op](q, k, v, spec)
    assert [choices.alike(problem) for choices, problem, _ in asked] == [case.key[1]]


def test_requests_are_what_the_model_launches(model: Path, as_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a forward chooses a configuration for is requested, for its rows."""
    made, inputs = MODELS["flux"]()
    loaded, asked = nq.load(model, mode="a8"), set()
    from nunchaku_py.kernels import launch, linear, quantize_act

    def noted(choices: config.Choices, problem: tuple, gpu: config.Gpu) -> config.Config:
        asked.add((choices.kernel, choices.alike(problem)))
        return choices.ranked(problem, gpu)[0]

    for module in (linear, quantize_act):
        monkeypatch.setattr(module, "choose", noted)
    monkeypatch.setattr(launch, "launch", lambda *args, **constants: None)  # what they compute matters to nothing
    monkeypatch.setenv("NUNCHAKU_PY_BACKEND", "triton")
    with torch.no_grad():
        loaded(**inputs)
    linears = tune_requests.stored_linears(model)
    rows = sorted({key[1][0] for key in asked})
    wanted = {tuning_cases.case_of(*request).key for request in tune_requests.requests(linears, rows, ("a8",), CPU)}
    assert asked and asked - wanted == set()


def test_modes_are_what_runs_here_or_those_named() -> None:
    sites = [tune_requests.Linear("x", Site("w4a4", "nvfp4", 16, 8), 64, 64),
             tune_requests.Linear("y.norm", Site("w4a16", "uint4", 64), 64, 64)]

    def acts(*modes: str) -> list[str]:
        found = tune_requests.requests(sites, (7,), modes, CPU)
        return [request.args[4].act.format for request in found if request.family == "linear"]

    assert acts() == ["int8", "none"] and acts("a4", "a16") == ["nvfp4", "none", "none"]
    assert tune_requests.requests(sites[1:], (7,), (), CPU)[0].args[:3] == ("", 1, 64)


def test_without_a_model_flux() -> None:
    linears = tune_requests.flux_linears()
    sizes = {(linear.n, linear.k) for linear in linears}
    assert {(3072, 3072), (12288, 3072), (3072, 12288), (9216, 3072), (3072, 15360)} <= sizes
    found = tune_requests.requests(linears, (4608,), ("a4",), CPU)
    suffixes = {request.args[0] for request in found if request.family == "linear"}
    assert suffixes == {"", "_gelu_quantize"} and len(found) == len(set(found))


# --------------------------------------------------------------------------------------------------------- what it does
def test_it_measures_keeps_lists_and_clears(model: Path, as_gpu: None, cache: Path, capsys, tmp_path: Path) -> None:
    assert run("tune", "--list") == 0 and "nothing is measured yet" in capsys.readouterr().out
    assert run(*TUNE, model, "--out", tmp_path / "tuned.json") == 0
    said = capsys.readouterr().out
    file, = cache.iterdir()
    kept = json.loads(file.read_text())["measured"]
    count = len(kept)
    assert f"{count} problems to measure, 0 known" in said and f"measured {count} problems, of which {count}" in said
    assert f"kept in {file}" in said and (tmp_path / "tuned.json").read_text() == file.read_text()
    assert {"linear_w4a8_expanding", "linear_w4a16", "quantize_act"} <= {one["kernel"] for one in kept}

    assert run(*TUNE, model) == 0 and f"0 problems to measure, {count} known" in capsys.readouterr().out
    assert run("tune", "--list") == 0
    listed = capsys.readouterr().out
    assert str(file) in listed and listed.count("2.00x") == count
    assert "int8 x int4, 5 rows, 128 -> 512, activate" in listed
    assert run("tune", "--clear") == 0 and "removed 1 file" in capsys.readouterr().out
    assert not list(cache.iterdir())


def test_what_is_measured_is_what_runs(model: Path, as_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from nunchaku_py.kernels import linear

    spec = tune_requests.stored_linears(model)[0].site.linear_spec("a8", 128, "scaled")
    choices, problem = linear.choices_of(spec), linear.problem_of(5, 128, spec, "store")
    gpu = tuner.gpu_of(torch.empty(0))
    before = config.choose(choices, problem, gpu)
    run(*TUNE, model)
    assert config.choose(choices, problem, gpu) == choices.ranked(problem, gpu)[1] != before
    monkeypatch.setenv(tuning.ENVIRONMENT, "0")
    config.forget()
    assert config.choose(choices, problem, gpu) == before


def test_interrupted_it_says_what_is_kept(model: Path, as_gpu: None, cache: Path, capsys, monkeypatch) -> None:
    measure, done = tuner.Tuner.measure, []

    def interrupted(self: tuner.Tuner, case: tuner.Case) -> tuner.Outcome:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(case)
        return measure(self, case)

    monkeypatch.setattr(tuner.Tuner, "measure", interrupted)
    assert run(*TUNE, model) == 130
    assert "interrupted; 2 problems of " in capsys.readouterr().err
    assert len(json.loads(next(cache.iterdir()).read_text())["measured"]) == 2


def test_it_stops_when_the_time_is_over(model: Path, as_gpu: None, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, *[9.0] * 999])
    monkeypatch.setattr(tuner.time, "monotonic", lambda: next(clock))
    assert run(*TUNE, model, "--seconds", "5") == 0
    assert "stopped after 5 s with" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- mistakes
def test_mistakes_are_sentences(model: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*argv: object) -> str:
        assert run(*argv) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "unexpected" not in said
        return said

    if not torch.cuda.is_available():
        assert "sees no CUDA device" in refused("tune")
    assert "no such device" in refused("tune", "--device", "gpu0")
    assert "Triton does not serve cpu: the tensors are on cpu" in refused(*TUNE)
    taken_for_gpu(monkeypatch, (8, 9))
    assert "no such file" in refused(*TUNE, tmp_path / "absent")
    assert "holds no linears that this package has quantized" in refused(*TUNE, tmp_path)


def test_where_nothing_compiles_it_says_so(model: Path, as_gpu: None, cache: Path, capsys, monkeypatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tuner.Tuner, "compile", broken)
    assert run(*TUNE, model) == 1 and "nothing could be measured" in capsys.readouterr().err
    assert not cache.exists()


def test_a_damaged_file_is_listed_as_that(cache: Path, capsys) -> None:
    cache.mkdir(parents=True)
    (cache / "x.json").write_text("{")
    assert run("tune", "--list") == 0
    assert "x.json: holds no measurements that can be understood" in capsys.readouterr().out
