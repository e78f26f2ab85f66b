"""What a run does about a spike of its loss: `train.on_spike`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.state import TrainState
from bigtrain.errors import BigtrainError
from bigtrain.step_result import StepResult
from bigtrain.training.spike import MOST_ROLLBACKS, Spikes

Policy = Literal["stop", "skip", "rollback", "ignore"]

KEPT_AS = "spikes"
"""Where `TrainState.notes` have what is known of losses."""


class Spike(NamedTuple):
    """A spike that a run goes on from.

    `step` is the one that it was met in, `back_to` the step that the run went back to, `rows` the first and last place
    in the stream of rows of what is left out; both None where the step was skipped.
    """

    step: int
    loss: float
    limit: float
    back_to: int | None = None
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        text = f"step {self.step}: a loss of {self.loss:.4f} is a spike, above {self.limit:.4f}"
        if self.rows is None:
            return f"{text}: its update is left out"
        return f"{text}: back to step {self.back_to}, rows {self.rows[0]} to {self.rows[1]} are left out"

    def row(self, tokens: int) -> dict[str, Any]:
        """Return it as a metrics row, of the step after which the run goes on, so that a resume cuts it or keeps it."""
        found = {"tokens": tokens, "spike_step": self.step, "spike_loss": self.loss, "spike_limit": self.limit}
        if self.back_to is None or self.rows is None:
            return {"step": self.step, **found}
        first, last = self.rows
        return {"step": self.back_to + 1, **found, "back_to": self.back_to, "left_out_from": first, "left_out_to": last}


class SpikePolicy:
    """Watch the losses of a run and act on a spike, alike on all ranks. Waits for a GPU at each step, unless `ignore`.

    Going back means to the newest checkpoint that was due by steps, so that a run which was interrupted meanwhile, and
    saved then, goes back to where it would have gone without; to the newest of any kind where there is none.
    """

    def __init__(self, policy: Policy, state: TrainState, saver: Saver, *, every_steps: int | None) -> None:
        self._policy, self._state, self._saver = policy, state, saver
        self._every = every_steps or 1
        self._spikes = Spikes(state.notes.get(KEPT_AS))

    def before_update(self) -> None:
        """Let the engine leave out the update of a step that is a spike, if that is the policy."""
        if self._policy == "skip":
            self._state.engine.highest_loss = self._spikes.limit

    def after_update(self, result: StepResult) -> Spike | None:
        """Take in a step's loss; return the spike that it was, with the state that the run goes on from.

        Raises BigtrainError where the policy is to stop, and where going back has not helped.
        """
        if self._policy == "ignore":
            return None
        state, loss, limit = self._state, float(result.loss), self._spikes.limit
        found = Spike(state.step, loss, limit)
        if not self._spikes.add(loss, state.step):
            state.notes[KEPT_AS] = self._spikes.state()
            return None
        if self._policy == "stop":
            raise BigtrainError(f"{_met(found)} (train.on_spike=stop); {self._saver.last_good()}")
        return found if self._policy == "skip" else self._go_back(found)

    def _go_back(self, found: Spike) -> Spike:
        if not self._spikes.may_go_back:
            text = f"after going back {MOST_ROLLBACKS} times without getting past that step (train.on_spike=rollback)"
            raise BigtrainError(f"{_met(found)}, {text}; {self._saver.last_good()}")
        folder = self._saver.back_to(self._every)
        if folder is None:
            raise BigtrainError(f"{_met(found)}, and there is no checkpoint to go back to (train.on_spike=rollback)")
        state, before = self._state, self._spikes
        position, end = state.loader.position, state.loader.state_dict()["row"]
        state.restore(folder, other_data=True)  # one of this run, which may have been allowed other data since
        rows = (int(state.loader.state_dict()["row"]), int(end) - 1)
        state.loader.seek(position)
        self._spikes = Spikes(state.notes.get(KEPT_AS))
        self._spikes.gone_back(before, found.step, rows)
        state.notes[KEPT_AS] = self._spikes.state()
        return found._replace(back_to=state.step, rows=rows)


def _met(found: Spike) -> str:
    return f"step {found.step}: a loss of {found.loss:.4f} is a spike, above {found.limit:.4f}; nothing of it was saved"
