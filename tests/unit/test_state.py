"""The order of the stages."""

from service.plan.stages import Stage


def test_no_stage_comes_before_what_it_reads() -> None:
    """Within a wave the ledger hands units out in the order of this table; the plan says the rest."""
    order = list(Stage)
    assert order[0] == Stage.PREPARE
    assert order[-2:] == [Stage.SELECT, Stage.VALIDATE]
    for earlier, later in (
        (Stage.WARMUP, Stage.LANDMARK_GRADIENTS),
        (Stage.CANDIDATES, Stage.CHOOSE_EMBEDDING),
        (Stage.CHOOSE_EMBEDDING, Stage.EMBED),
        (Stage.CURVATURE, Stage.PROPAGATE),
        (Stage.PROPAGATE, Stage.REFINE),
        (Stage.REFINE, Stage.SELECT),
    ):
        assert order.index(earlier) < order.index(later)
