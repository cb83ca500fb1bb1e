"""What every family promises, each opened through the loader alone and asked the same questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
import torch
from family_cases import CASES
from samples import moving
from torch import Tensor, nn

from stream_diffvsr import load_pipeline
from stream_diffvsr.errors import IncompatibleInputError
from stream_diffvsr.load import FAMILIES, family_of
from stream_diffvsr.upscaler import State, Upscaled, Upscaler

START = 7
"""Of the sequences here, in their video."""


@dataclass
class Subject:
    """A loaded family with the sequence it is asked about."""

    name: str
    model: Upscaler
    options: Any
    frames: list[Tensor]
    """To the second border, and three more."""
    whole: list[Upscaled] = field(default_factory=list)
    border: State = field(default_factory=State)
    """The state at the first border."""

    def session(self, state: State | None = None, on_step: Any = None) -> Any:
        return self.model.session(self.options, state or State(index=START), on_step)

    def run(self, frames: list[Tensor], state: State | None = None) -> list[Upscaled]:
        return list(self.model.stream(frames, self.options, state or State(index=START)))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    made: dict[str, Subject] = {}
    for name, case in CASES.items():
        path = case.make(tmp_path_factory.mktemp(name))
        assert family_of(path) == name
        model = load_pipeline(path, device="cpu", **case.loading)
        frames = list(moving(model.info.first + model.info.chunk + 3, 16, 16).split(1))
        made[name] = Subject(name, model, model.Options(**case.options), frames)
        made[name].whole = made[name].run(frames)
        session = made[name].session()
        for frame in frames[: model.info.first]:
            session.push(frame)
        made[name].border = session.state()
    return made


@pytest.fixture(params=FAMILIES)
def subject(request: pytest.FixtureRequest, subjects: dict[str, Subject]) -> Subject:
    return subjects[request.param]


def same(results: list[Upscaled], others: list[Upscaled]) -> bool:
    return [r.index for r in results] == [r.index for r in others] and all(
        torch.equal(one.hq, other.hq) for one, other in zip(results, others, strict=True)
    )


def test_what_a_model_says_of_itself(subject):
    model, info = subject.model, subject.model.info
    assert (info.family, info.number_format, info.runtime) == (subject.name, "float32", "torch")
    assert info.model and info.minimum == 8 and 0 <= info.look_ahead < max(info.first, 1)
    assert info.frame_by_frame == (info.first == 1 and info.chunk == 1)
    assert info.scales is None or model.Options().__dict__.get("scale") is None
    assert all(isinstance(network, nn.Module) for network in model.networks.values())
    assert model.placement.fixed and (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert model.bytes_needed((16, 16), subject.options) > 0
    made = model.provenance((16, 16), subject.options)
    assert made.model == info.model and json.loads(json.dumps(dict(made.options))) == dict(made.options)
    assert made.options.keys() <= asdict(subject.options).keys()


def test_as_many_out_as_in(subject):
    """The first results come with frame `first`, later ones with every `chunk` more, and none is missing."""
    first, chunk = subject.model.info.first, subject.model.info.chunk
    for count in sorted({0, 1, first, first + 1}):
        results = subject.run(subject.frames[:count])
        assert [result.index for result in results] == list(range(START, START + count))
    session, came = subject.session(), []
    for count, frame in enumerate(subject.frames, 1):
        results = session.push(frame)
        assert bool(results) == (count >= first and (count - first) % chunk == 0)
        assert (session.state() is not None) == bool(results)
        came += results
    assert same(came + session.finish(), subject.whole)
    assert len(subject.whole) == len(subject.frames)
    if not subject.model.info.frame_by_frame:
        assert session.state() is None
        with pytest.raises(IncompatibleInputError, match="the sequence has ended"):
            session.push(subject.frames[0])


LARGE = [pytest.param((300, 500), scale, marks=pytest.mark.long) for scale in (2.0, 4.0)]


@pytest.mark.parametrize(("size", "scale"), [((8, 8), 4.0), ((9, 14), 1.0), ((21, 33), 2.5), *LARGE])
def test_exact_size(size, scale, subject):
    scales = subject.model.info.scales
    options = subject.options if scales else replace(subject.options, scale=scale)
    (result,) = subject.model.stream(moving(1, *size).split(1), options)
    assert result.hq.shape == (1, 3, *(round(side * (scales[0] if scales else scale)) for side in size))
    assert result.hq.dtype == torch.float32 and result.hq.isfinite().all()
    assert not result.hq.requires_grad and not result.hq.is_inference()


def test_no_frame_depends_on_what_lies_beyond_its_look_ahead(subject):
    info, frames = subject.model.info, subject.frames
    for known in (info.first, info.first + info.chunk):
        changed = subject.run([*frames[:known], *(-frame for frame in frames[known:])])
        sure = known - info.look_ahead
        assert same(changed[:sure], subject.whole[:sure])
        assert not torch.equal(changed[-1].hq, subject.whole[-1].hq)
    last = info.look_ahead
    changed = subject.run([*frames[:last], -frames[last]])
    assert not torch.equal(changed[0].hq, subject.whole[0].hq)  # it is no smaller than told


def test_lazy_and_its_input_is_left_alone(subject):
    info, taken = subject.model.info, []

    def source() -> Iterator[Tensor]:
        for frame in subject.frames:
            taken.append(frame)
            shared = frame.clone()
            yield shared
            assert torch.equal(shared, frame)
            shared.zero_()  # what was pushed may be used again

    results = []
    for result in subject.model.stream(source(), subject.options, State(index=START)):
        assert len(taken) in (
            info.first,
            *range(info.first, len(subject.frames) + 1, info.chunk),
            len(subject.frames),
        )
        assert len(taken) <= result.index - START + 1 + info.look_ahead
        results.append(result)
    assert same(results, subject.whole)


def test_continued_at_every_border_through_saved_states(subject, tmp_path):
    state, results, borders = State(index=START), [], 0
    while True:
        session, kept = subject.session(state), {name: each.clone() for name, each in state.tensors.items()}
        for frame in subject.frames[state.index - START :]:
            if got := session.push(frame):
                break
        else:
            break
        assert all(torch.equal(each, kept[name]) for name, each in state.tensors.items())
        results, made, borders = results + got, session.state(), borders + 1
        assert (made.family, made.index) == (subject.name, results[-1].index + 1)
        assert made.provenance == subject.model.provenance((16, 16), subject.options)
        made.save(tmp_path / "state")
        state = State.load(tmp_path / "state")
        assert (state.family, state.index, state.provenance) == (made.family, made.index, made.provenance)
        assert state.tensors.keys() == made.tensors.keys() and state.nbytes == made.nbytes
    assert borders == (len(subject.frames) if subject.model.info.frame_by_frame else 2)
    assert same(results + session.finish(), subject.whole)


def test_sessions_do_not_disturb_each_other(subject):
    one, two = subject.session(), subject.session(State(index=START + 1))
    results: list[Upscaled] = []
    for frame in subject.frames:
        results += one.push(frame)
        two.push(-frame)
    assert same(results + one.finish(), subject.whole)


def test_an_exception_from_on_step_leaves_nothing_half_done(subject):
    calls = {"now": 0, "stop": 0}

    def on_step(stage: str, done: int, total: int) -> None:
        assert stage and 1 <= done <= total
        calls["now"] += 1
        if calls["now"] == calls["stop"]:
            raise KeyboardInterrupt(stage)

    def stopped(go: Callable[[], list[Upscaled]], stops: tuple[int, ...]) -> list[Upscaled]:
        for stop in stops:
            calls.update(now=0, stop=stop)
            with pytest.raises(KeyboardInterrupt):
                go()
        calls.update(now=0, stop=0)
        return go()

    info, session, results, most = subject.model.info, subject.session(on_step=on_step), [], 0
    for count, frame in enumerate(subject.frames, 1):
        stops = (1, max(2, most // 3)) if count == info.first + info.chunk else ()
        results += stopped(lambda frame=frame: session.push(frame), stops)
        most = max(most, calls["now"])
    results += stopped(session.finish, () if info.frame_by_frame else (1, most // 3))
    assert same(results, subject.whole)


@pytest.mark.parametrize("other", FAMILIES)
def test_a_state_of_another_family_is_refused(other, subject, subjects):
    if other == subject.name:
        return
    with pytest.raises(IncompatibleInputError, match=f"the state belongs to {other}, not to ") as caught:
        subject.session(subjects[other].border).push(subject.frames[0])
    assert "\n" not in str(caught.value)


BAD = {
    "finite": lambda frame: frame / 0,
    "at least 8": lambda frame: frame[..., :7],
    "float32": lambda frame: frame.double(),
    "3": lambda frame: frame[:, :1],
}


@pytest.mark.parametrize("said", BAD)
def test_a_frame_that_does_not_fit_is_refused_at_once(said, subject):
    session = subject.session()
    with pytest.raises(IncompatibleInputError, match=said):
        session.push(BAD[said](subject.frames[0]))
    session.push(subject.frames[0])
    with pytest.raises(IncompatibleInputError, match="16"):
        session.push(moving(1, 8, 12))
