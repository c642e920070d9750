# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from zsq.analysis.history import agreement, crossings, loss_history

RECORDS = [
    {"time": 1.0, "stage": "synthesis", "step": 0, "loss": 3.0, "batch": 0},
    {"time": 2.0, "stage": "synthesis", "step": 50, "loss": 1.0, "batch": 0},
    {"time": 3.0, "stage": "finetune", "step": 0, "generator_ce": 2.0},
    {"time": 4.0, "stage": "agreement", "step": 50, "kl,ce": {"overall": -0.5, "a": -0.7, "b": 0.1}},
    {"time": 4.0, "stage": "finetune", "step": 50, "kl": 0.5, "ce": None,
     "changed": {"a": 0.01, "b": 0.0}, "multiplier": {"a": 4.0, "b": 1.0}, "moved": {"a": 0.01, "b": 0.0}},
    {"time": 5.0, "stage": "agreement", "step": 100, "kl,ce": {"overall": 0.25, "a": 0.2, "b": 0.3}},
    {"time": 5.0, "stage": "finetune", "step": 100, "kl": 0.25,
     "changed": {"a": 0.02, "b": 0.01}, "multiplier": {"a": 8.0, "b": 2.0}, "moved": {"a": 0.03, "b": 0.01}},
]  # fmt: skip


def test_losses_are_collected_per_stage_without_what_is_no_loss():
    found = loss_history(RECORDS).stages
    assert set(found) == {"synthesis", "finetune"}
    assert set(found["synthesis"]) == {"loss"}
    assert found["finetune"]["kl"].steps == (50, 100)
    assert found["finetune"]["kl"].values == (0.5, 0.25)
    assert "ce" not in found["finetune"]


def test_blocks_follow_each_other():
    """Each counts its own steps from 0; a block's number is no loss."""

    def block(stage, piece, index, losses):
        steps = [
            {"stage": stage, "step": i, "loss": loss, "piece": piece, "index": index} for i, loss in enumerate(losses)
        ]  # fmt: skip
        return [*steps, {"stage": stage, "step": len(losses), "piece": piece, "undecided": 0.5}]

    records = [
        *block("tuning", "a", 0, [4.0, 3.0]), *block("tuning", "b", 1, [2.0, 1.0]),
        *block("tuning of activations", "a", 0, [9.0]), {"stage": "tuning", "step": 0, "kl": 7.0},
    ]  # fmt: skip
    found = loss_history(records).stages
    assert set(found) == {
        "tuning, block by block",
        "tuning of activations, block by block",
        "tuning",
    }
    assert set(found["tuning, block by block"]) == {"loss", "undecided"}
    assert found["tuning, block by block"]["loss"].steps == (0, 1, 3, 4)
    assert found["tuning, block by block"]["loss"].values == (4.0, 3.0, 2.0, 1.0)
    assert found["tuning of activations, block by block"]["loss"].values == (9.0,)
    assert found["tuning"]["kl"].values == (7.0,)


def test_a_resumed_runs_repeated_steps_count_once():
    again = [*RECORDS, {**RECORDS[1], "loss": 9.0}]
    assert loss_history(again).stages["synthesis"]["loss"].values == (3.0, 9.0)


def test_agreement_is_summed_up():
    found = agreement(RECORDS)
    assert found.terms == "kl,ce"
    assert found.overall.values == (-0.5, 0.25)
    assert found.opposed == 0.5
    assert found.mean == pytest.approx(-0.125)
    assert set(found.layers) == {"a", "b"}
    assert agreement(RECORDS[:3]) is None


def test_crossings_say_what_never_moved():
    found = crossings(RECORDS)
    assert found.changed["a"].values == (0.01, 0.02)
    assert found.multiplier["b"].values == (1.0, 2.0)
    assert found.never_moved == {"a": pytest.approx(0.97), "b": pytest.approx(0.99)}
    assert crossings(RECORDS[:4]) is None


@pytest.mark.parametrize("make", [loss_history, agreement, crossings])
def test_everything_can_be_drawn_and_written(make, tmp_path):
    found = make(RECORDS)
    json.dumps(found.to_dict(), allow_nan=False)
    found.plot().savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_nothing_recorded_draws_nothing():
    loss_history([]).plot()
