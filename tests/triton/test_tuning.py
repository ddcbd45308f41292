"""Measured configurations: the file they are kept in, what is taken from it, and how they are measured, by timers that
say what they are told to."""
from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nunchaku_py import NunchakuError, ops
from nunchaku_py.kernels import (
    config,
    linear,
    linear_w4a4,
    linear_w4a8,
    quantize_act,
    tuner,
    tuning,
    tuning_cases,
)
from nunchaku_py.kernels.config import Choices, Config, Gpu
from nunchaku_py.kernels.tuning import Measured, Origin
from nunchaku_py.ops import ActSpec, LinearSpec

GPU = Gpu("Fake GPU: 24 GB", (8, 9), 100, 99 * 1024)
FIRST, SECOND, LARGE = Config(16, 32, 64, 4, 2), Config(32, 32, 64, 4, 2), Config(512, 512, 64, 4, 2)
CHOICES = Choices("kernel", (FIRST, SECOND, LARGE), lambda problem, it, gpu: math.inf if it == LARGE else it.m * 1.0,
                  lambda problem: (config.rows_alike(problem[0]), *problem[1:]))
PROBLEM = (100, 64, "store")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    monkeypatch.delenv(tuning.ENVIRONMENT, raising=False)
    config.forget()
    yield tmp_path
    config.forget()


def entry(taken: Config = SECOND, problem: tuple = CHOICES.alike(PROBLEM), **more: object) -> Measured:
    return replace_all(Measured("kernel", problem, tuple(taken), 1e-3, tuple(FIRST), 2e-3, "a label"), more)


def replace_all(one: Measured, more: dict) -> Measured:
    return one._replace(**more)


def record(*entries: Measured, gpu: Gpu = GPU) -> None:
    tuning.record(gpu, entries)
    config.forget()


def chosen(problem: tuple = PROBLEM) -> Config:
    return config.choose(CHOICES, problem, GPU)


# ------------------------------------------------------------------------------------------------------- what is taken
def test_the_measured_one_is_taken_for_all_problems_alike() -> None:
    assert chosen() == FIRST
    record(entry())
    assert chosen() == chosen((65, 64, "store")) == SECOND
    assert chosen((64, 64, "store")) == chosen((100, 64, "glu")) == FIRST
    assert config.choose(CHOICES, PROBLEM, GPU._replace(name="Another")) == FIRST


def test_a_switch_ignores_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    record(entry())
    monkeypatch.setenv(tuning.ENVIRONMENT, "0")
    assert chosen() == FIRST
    config.forget()
    monkeypatch.setenv(tuning.ENVIRONMENT, "yes")
    with pytest.raises(NunchakuError, match="NUNCHAKU_PY_TUNING: expected 0 or 1, got 'yes'"):
        chosen()


@pytest.mark.parametrize("taken", [Config(1, 2, 3, 4, 5), LARGE], ids=["no row any more", "does not fit"])
def test_a_configuration_that_cannot_be_taken_is_ignored(taken: Config) -> None:
    record(entry(taken))
    assert chosen() == FIRST


def test_the_file_is_read_once() -> None:
    record(entry())
    assert chosen() == SECOND
    Origin.of(GPU).path.unlink()
    assert chosen() == chosen((90, 64, "store")) == SECOND


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', '{"format": 9}', '{"format": 1}', "\0", "[" * 9999,
                                  '{"format": 1, "origin": {}, "measured": 3}'])
def test_a_damaged_file_is_a_warning_and_the_default(text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = Origin.of(GPU).path
    path.parent.mkdir()
    path.write_text(text)
    assert warnings(caplog, PROBLEM, (9, 9, "store")) == 1
    record(entry())
    assert chosen() == SECOND


@pytest.mark.parametrize("wrong", [{"config": "abc"}, {"seconds": None}, {"problem": [[1]]}, {"more": 1},
                                   {"label": 1.5}])
def test_a_damaged_entry_is_no_different(wrong: dict, caplog: pytest.LogCaptureFixture) -> None:
    record(entry())
    path = Origin.of(GPU).path
    data = json.loads(path.read_text())
    data["measured"][0] |= wrong
    path.write_text(json.dumps(data))
    assert warnings(caplog, PROBLEM) == 1


def test_a_file_cut_short_anywhere_is_never_a_crash(caplog: pytest.LogCaptureFixture) -> None:
    record(entry())
    path = Origin.of(GPU).path
    whole = path.read_text().rstrip()
    for length in range(0, len(whole), 37):
        path.write_text(whole[:length])
        assert warnings(caplog, PROBLEM) == 1


def test_a_file_of_another_gpu_or_triton_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    record(entry(), gpu=GPU._replace(name="Another"))
    other = Origin.of(GPU._replace(name="Another")).path
    other.rename(Origin.of(GPU).path)
    assert warnings(caplog, PROBLEM) == 1
    assert "was measured on Another (8.9)" in caplog.text


def warnings(caplog: pytest.LogCaptureFixture, *problems: tuple) -> int:
    """How many these problems, for which nothing measured is to be found, give rise to."""
    config.forget()
    caplog.clear()
    logger = logging.getLogger("nunchaku_py")
    logger.propagate, logger.handlers = True, []  # the command line's tests leave them otherwise
    assert all(chosen(problem) == FIRST for problem in problems)
    return sum(record.name == logger.name for record in caplog.records)


def test_files_are_apart_by_gpu_triton_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Origin.of(GPU)
    assert here.path.name == f"Fake-GPU-24-GB-8.9-triton-{here.triton}-{here.kernels}.json"
    paths = {origin.path for origin in (here, here._replace(gpu="x"), here._replace(capability=(9, 0)),
                                        here._replace(triton="4"), here._replace(kernels="0"))}
    assert len(paths) == 5
    monkeypatch.delenv(tuning.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert here.path.parent.as_posix() == "/somewhere/nunchaku_py/tuning"


def test_what_others_write_meanwhile_is_kept() -> None:
    other = entry(problem=(1, 1, "store"))
    record(entry())
    tuning.read(Origin.of(GPU))
    tuning.record(GPU, [other])  # by another process
    record(entry(FIRST))
    assert set(tuning.read(Origin.of(GPU)).values()) == {entry(FIRST), other}
    assert [path.suffix for path in Origin.of(GPU).path.parent.iterdir()] == [".json"]


def test_without_a_home_folder_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(tuning.FOLDER)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tuning.Path, "home", homeless)
    assert chosen() == FIRST
    with pytest.raises(NunchakuError, match="no home folder .* NUNCHAKU_PY_CACHE"):
        record(entry())


def test_a_write_that_fails_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    record(entry())

    def full(*paths: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(tuning.os, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            tuning.record(GPU, [entry(FIRST)])
    assert list(tuning.read(Origin.of(GPU)).values()) == [entry()]
    assert len(list(Origin.of(GPU).path.parent.iterdir())) == 1


# --------------------------------------------------------------------------------------------------- how it is measured
class FakeTimer:
    """A turn calls once, and takes as long as the call says."""

    def sets(self, nbytes: int) -> int:
        return 2

    def turn(self, run: tuner.Run, sets: int) -> tuner.Turn:
        return lambda: run(sets - 1)


def case(seconds: dict[Config, float], m: int = PROBLEM[0]) -> tuner.Case:
    """A call that takes so long; a configuration not named does not compile."""
    spec = ActSpec("int8")
    args = torch.zeros(1, 8, dtype=torch.bfloat16), torch.ones(8), torch.zeros(0, 8, dtype=torch.bfloat16), spec
    return tuner.Case("quantize_act", f"{m} rows", CHOICES, (m, *PROBLEM[1:]), lambda device: args,
                      lambda _, taken: seconds[taken])


@pytest.fixture
def measuring(as_gpu: None, monkeypatch: pytest.MonkeyPatch) -> tuner.Tuner:
    made = tuner.Tuner(torch.device("cpu"), FakeTimer)
    made.gpu = GPU
    return made


def outcome(made: tuner.Tuner, seconds: dict[Config, float]) -> tuner.Outcome:
    found, = made.run([case(seconds)])
    return found


@pytest.mark.parametrize("second, taken", [(0.99, FIRST), (0.97, SECOND), (2.0, FIRST)])
def test_another_is_taken_only_where_it_is_clearly_faster(
    measuring: tuner.Tuner, second: float, taken: Config
) -> None:
    assert outcome(measuring, {FIRST: 1.0, SECOND: second}).measured.config == taken
    assert chosen() == taken


def test_what_does_not_compile_is_left_out(measuring: tuner.Tuner) -> None:
    assert chosen() == FIRST
    found = outcome(measuring, {SECOND: 3.0}).measured
    assert (found.config, found.default, found.default_seconds) == (SECOND, FIRST, None)
    assert chosen() == SECOND
    config.forget()
    assert chosen() == SECOND


def test_where_nothing_runs_nothing_is_written(measuring: tuner.Tuner) -> None:
    found = outcome(measuring, {})
    assert found.measured is None and "none of its configurations runs" in found.why
    assert not tuning.files() and chosen() == FIRST


def test_what_triton_refuses_is_not_measured(measuring: tuner.Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = outcome(measuring, {FIRST: 1.0})
    assert found.measured is None and found.why == "the tensors are on cpu"


def test_time_and_interruptions_keep_what_is_measured(measuring: tuner.Tuner) -> None:
    class Interrupted(dict):
        def __getitem__(self, taken: Config) -> float:
            raise KeyboardInterrupt

    run = measuring.run([case({FIRST: 1.0, SECOND: 0.5}), case(Interrupted(), 7)])
    assert next(run).measured.config == SECOND
    with pytest.raises(KeyboardInterrupt):
        next(run)
    assert chosen() == SECOND
    measuring.end = 0.0
    assert list(measuring.run([case({FIRST: 1.0}, 9)])) == []


def test_what_another_process_has_overwritten_is_written_again(measuring: tuner.Tuner) -> None:
    run = measuring.run([case({FIRST: 1.0}, 9), case({FIRST: 1.0}, 99)])
    next(run)
    Origin.of(GPU).path.unlink()
    next(run)
    assert len(tuning.read(Origin.of(GPU))) == 2


def test_each_problem_once_and_none_that_is_known() -> None:
    cases = [case({}, m) for m in (100, 90, 7)]
    assert [it.label for it in tuner.unmeasured(cases, ())] == ["100 rows", "7 rows"]
    assert [it.label for it in tuner.unmeasured(cases, [cases[0].key])] == ["7 rows"]


# --------------------------------------------------------------------------------------------------- what is measured
BF16 = torch.bfloat16
INT8, INT4, UINT4, NVFP4 = ActSpec("int8"), ActSpec("int4", 64), ActSpec("uint4", 64, 0.17), ActSpec("nvfp4", 16)
A8 = LinearSpec("int8", 0, 64, INT8)
CASES = {
    "int8": ("linear", ("", 3, 48, 16, A8, BF16)),
    "gate": ("linear", ("_gate_residual", 3, 48, 16, A8, BF16)),
    "rope": ("linear", ("_qkv_rope", 3, 48, 16, replace(A8, head_dim=4), BF16)),
    "gelu": ("linear", ("_gelu_quantize", 3, 48, 16, replace(A8, activation="gelu_tanh", next=INT8), BF16)),
    "few expand": ("linear", ("", 3, 48, 0, LinearSpec("nvfp4", 16, 64, INT8, row_scales=True), BF16)),
    "many expand": ("linear", ("", 65, 48, 0, LinearSpec("int4", 64, 64, INT8, row_scales=True), BF16)),
    "int4": ("linear", ("_glu_quantize", 3, 128, 16, LinearSpec(
        "int4", 64, 128, UINT4, activation="gelu", next=INT4), torch.float16)),
    "nvfp4": ("linear", ("", 3, 48, 16, LinearSpec("nvfp4", 16, 64, NVFP4), BF16)),
    "weights only": ("linear", ("", 1, 48, 0, LinearSpec("uint4", 64, 64, ActSpec("none", 64)), BF16)),
    "quantize": ("quantize", (3, 64, 16, UINT4, BF16)),
    "quantize int8": ("quantize", (3, 64, 0, INT8, BF16)),
    "norm": ("quantize", (3, 64, 16, replace(NVFP4, norm="rms"), BF16)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_what_the_op_launches(name: str, as_blackwell: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operands are the op's, and its problem is the one that a configuration is chosen for."""
    made, asked = tuning_cases.case_of(*CASES[name]), []

    def first(choices: Choices, problem: tuple, gpu: Gpu) -> Config:
        asked.append((choices, problem))
        return choices.ranked(problem, gpu)[0]

    for module in (linear, quantize_act):
        monkeypatch.setattr(module, "choose", first)
    operands = made.operands(torch.device("cpu"))
    ops.OPS[made.op].check(*operands)
    with ops.backend("triton"):
        plain = ops.OPS[made.op](*operands)
    assert asked[0] == (made.choices, made.problem)
    same = made.call(operands, made.choices.ranked(made.problem, GPU)[0])
    for one, other in zip(as_tuple(plain), as_tuple(same), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype


def as_tuple(found: object) -> tuple:
    return found if isinstance(found, tuple) else (found,)


def test_a_gate_shares_what_is_measured_without_one() -> None:
    gated, stored, active = (tuning_cases.case_of(*CASES[name]).key for name in ("gate", "int8", "gelu"))
    assert gated == stored != active


def test_formats_share_no_measurement() -> None:
    """Which also read as often, in groups as large."""
    specs = INT4, UINT4, ActSpec("none", 64), replace(INT4, norm="layer")
    assert len({tuning_cases.case_of("quantize", (3, 64, 16, spec, BF16)).key for spec in specs}) == 4


@pytest.mark.parametrize("capability", [(8, 6), (9, 0), (12, 0)])
def test_every_ending_has_a_configuration(capability: tuple[int, int]) -> None:
    """With the widest head, and with groups of 64 for the next linear, whose value and gate are 128 channels."""
    gpu = GPU._replace(capability=capability)
    kinds = [LinearSpec("int8", 0, 64, INT8), LinearSpec("nvfp4", 16, 64, INT8, row_scales=True),
             LinearSpec("int4", 64, 64, INT4), LinearSpec("nvfp4", 16, 64, NVFP4),
             LinearSpec("uint4", 64, 64, ActSpec("none", 64))]
    for spec in kinds:
        for ending, more in (("", {}), ("gate", {}), ("rope", {"head_dim": 128}), ("activate", {"next": INT4}),
                             ("glu", {"next": INT4}), ("glu", {"next": INT8})):
            for m in (1, 4608):
                problem = linear.problem_of(m, 9216, replace(spec, **more), ending or "store")
                assert linear.choices_of(spec).ranked(problem, gpu)


def test_rows_share_their_measurements_up_to_a_power_of_two() -> None:
    keys = [tuning_cases.case_of("quantize", (m, 64, 16, INT4, BF16)).key for m in (4097, 4608, 8192, 4096, 0, 1)]
    assert keys[0] == keys[1] == keys[2] != keys[3] and keys[4] == keys[5]
    few, many = (linear.problem_of(m, 3072, replace(A8, k=12288), "store") for m in (1280, 2048))
    assert linear_w4a8.CHOICES.alike(few) == linear_w4a8.CHOICES.alike(many) == many
    assert linear_w4a8.CHOICES.ranked(few, GPU)[0] != linear_w4a8.CHOICES.ranked(many, GPU)[0]  # unless measured
    assert config.rows_alike(1) == 1 and linear_w4a8.CHOICES.kernel != linear_w4a4.CHOICES.kernel


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "BEST", 3)
    cases = [tuning_cases.case_of(*CASES[name]) for name in ("int8", "gelu", "norm", "weights only")]
    made = tuner.Tuner(torch.device("cuda"), tuner.GraphTimer)
    found = [outcome.measured for outcome in made.run(cases)]
    assert len(found) == len(cases) and made.compiled > 0
    for case, measured in zip(cases, found, strict=True):
        assert 0 < measured.seconds < 0.01
        assert config.choose(case.choices, case.problem, made.gpu) == measured.config
