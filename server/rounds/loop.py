"""The round loop: wait, sample, send, admit, aggregate, evaluate, save.

It drives Flower's public Strategy methods, so any Flower strategy works unchanged, but not Flower's own
`Strategy.start`, which cannot resume or stop early, ends a run without a single reply as a success, and averages
whatever arrives.
"""

from __future__ import annotations

import time

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.document.federation import OF_A_MEAN
from common.errors import RunFailed
from common.wire.records import BUDGET_EXHAUSTED, LATE, LOST, REFUSED
from server.rounds import cohort, stopping
from server.rounds.admission import Rejection
from server.rounds.advice import on_divergence
from server.rounds.aggregation import Aggregator, EachReply, Mean
from server.rounds.cohort import Cohort
from server.rounds.round import Answers, EvaluatedRound, Round, RoundFailed, evaluate_round, train_round
from server.rounds.run import Event, Run

SAYS_NO = (REFUSED, BUDGET_EXHAUSTED)


def run_rounds(run: Run, grid: Grid, strategy: Strategy, *, wait_s: float | None = None) -> None:
    """Runs the rounds that are left, and leaves in `run` how they ended.

    Args:
        wait_s: seconds to wait for the quorum before each round; None waits for ever.

    Raises:
        RunFailed: too many failed rounds in a row, or no quorum within `wait_s`.
    """
    federation = run.federation
    if run.present:
        cohort.wait_for_those_who_were_here(run, grid)
    if run.pending:
        assert run.event is not None
        _complete(run, grid, strategy, run.event)
    failed, problem = 0, ""
    rounds = federation.training.rounds
    first = run.tried + 1 if run.round == rounds else min(run.tried + 1, rounds)  # the last one may be tried again
    for server_round in range(first, rounds + 1):
        if reason := stopping.verdict(run):
            run.status, run.reason = "completed", reason
            return
        started = time.monotonic()
        nodes = cohort.wait_for_quorum(run, grid, wait_s)
        if nodes is None:
            _end_by_budgets(run)
            return
        run.present = {run.name_of(node) for node in nodes}
        event: Event = {"event": "round", "round": server_round, "rounds": federation.training.rounds}
        event["waiting"] = time.monotonic() - started
        problem = _train(run, grid, strategy, nodes, server_round, event)
        if not problem:
            failed = 0
            run.round, run.tried, run.event = server_round, server_round, event
            _complete(run, grid, strategy, event)
            continue
        failed += 1
        event["failed"] = problem
        run.tried = server_round
        run.save()
        if server_round < rounds:
            run.settle()  # what came in counts for nothing, and nobody will ask for it again
        _note_privacy(run, event)
        run.observe(event)
        if cohort.budgets_are_spent(run, grid):
            _end_by_budgets(run)
            return
        if failed >= federation.strategy.max_failed_rounds:
            raise RunFailed(f"{failed} rounds in a row failed; the last: {problem}{_advice(run)}")
    # A run whose last rounds failed has not trained for as many rounds as it says.
    if failed:
        raise RunFailed(f"the last of {federation.training.rounds} rounds failed: {problem}{_advice(run)}")
    run.status, run.reason = "completed", stopping.verdict(run) or ""


def _end_by_budgets(run: Run) -> None:
    run.status = "budget_exhausted"
    run.reason = "the clients that are left are fewer than min_clients, because budgets are spent"


def _complete(run: Run, grid: Grid, strategy: Strategy, event: Event) -> None:
    """Evaluates a round that has trained, if it is one that evaluates, and tells of it.

    Nothing of a round leaves the server before it is saved: a restart would make it again, with other noise. And no
    client forgets a reply before: a restart may ask for it.
    """
    if run.federation.evaluates(run.round):
        run.pending = True
        run.save()
        run.settle()
        if (evaluated := _evaluate(run, grid, strategy)) is not None:
            if (evaluation := evaluated.metrics) is not None:
                event["evaluation"] = evaluation
                run.evaluation = evaluation or run.evaluation or {}
                stopping.note(run, evaluation)
            told = [r for r in evaluated.answers.rejected if not run.central or r.code in SAYS_NO]
            event["rejected"] += [_named(run, r) for r in told]
            event["seconds"] += evaluated.answers.seconds
    run.pending = False
    if run.held_out is not None:
        event["held_out"] = run.held_out_score = run.held_out(run.state)
    _note_privacy(run, event)
    run.save()
    run.settle()
    run.observe(event)


def _note_privacy(run: Run, event: Event) -> None:
    if run.epsilon is not None:
        event["privacy"] = {"row": {"epsilon": run.epsilon, "per_client": run.epsilon_per_client}}
    if run.central:
        event.setdefault("privacy", {})["client"] = {"epsilon": run.central.epsilon}


def _train(run: Run, grid: Grid, strategy: Strategy, nodes: list[int], server_round: int, event: Event) -> str:
    """Trains one round, moves the model on and adds to the event. Returns why the round failed; "" if it did not."""
    this = Round(
        federation=run.federation,
        run=run.name,
        number=server_round,
        cohort=cohort.choose(run, nodes, server_round),
    )
    loss, problem = None, ""
    try:
        trained = train_round(this, run.state, grid=grid, strategy=strategy, aggregator=lambda: _aggregator(run))
        run.state, loss, answers = trained.weights, trained.loss, trained.answers
    except RoundFailed as failure:
        problem, answers = failure.reason, failure.answers
    if run.central:
        run.charge()
    rejected = _heed(run, this, answers)
    hides = run.central is not None
    event |= {
        "clients": len(nodes) if hides else len(answers.counted),
        "asked": len(nodes) if hides else len(this.cohort.asked),
        "train": {"loss": loss},
        "rejected": [_named(run, r) for r in rejected],
        "seconds": answers.seconds,
    }
    _note_divergence(run, rejected, event)
    return problem


def _aggregator(run: Run) -> Aggregator:
    if run.central is not None:
        return run.central.aggregator(run.state)
    return Mean(run.state) if run.federation.strategy.name in OF_A_MEAN else EachReply()


def _heed(run: Run, this: Round, answers: Answers) -> list[Rejection]:
    """Draws the conclusions from how a round was answered: who took part, who said no, who is to rest. Returns the
    rejections that may be told."""
    _remember(run, answers)
    for rejection in answers.rejected:  # who said no to training is not asked again
        if rejection.code in SAYS_NO:
            run.gone[rejection.node_id] = rejection.code
    if run.central:
        # Who was sampled is a secret that the guarantee rests on; that someone is connected, or refuses, is not.
        run.clients |= {run.name_of(node) for node in this.cohort.nodes}
        return [r for r in answers.rejected if r.code in SAYS_NO]
    # Nobody is to blame for a reply that was lost with its link, or that a round did not wait for.
    excused = {r.node_id for r in answers.rejected if r.code == LOST}
    if answers.enough:
        excused |= answers.silent
    cohort.note_strikes(run, this.cohort.asked, set(answers.counted), excused, this.number)
    return list(answers.rejected)


def _note_divergence(run: Run, rejected: list[Rejection], event: Event) -> None:
    """Only of what is told: under `privacy.client` that a reply diverged would tell that it was asked for."""
    run.diverged = any(r.diverged for r in rejected)
    if run.diverged and not run.advised:
        run.advised, event["advice"] = True, on_divergence(run.federation)


def _advice(run: Run) -> str:
    return f"; {on_divergence(run.federation)}" if run.diverged else ""


def _evaluate(run: Run, grid: Grid, strategy: Strategy) -> EvaluatedRound | None:
    """Lets every client that can be asked score the model. None if none can."""
    nodes = cohort.present(run, grid)
    if not nodes:
        return None
    this = Round(
        federation=run.federation, run=run.name, number=run.round, cohort=Cohort(nodes, nodes, needed=len(nodes))
    )
    evaluated = evaluate_round(this, run.state, grid=grid, strategy=strategy, central=run.central)
    if run.central:
        run.charge()
    _remember(run, evaluated.answers)
    return evaluated


def _remember(run: Run, answers: Answers) -> None:
    """Keeps who took part, and what clients stated."""
    if not run.central:
        run.clients |= {run.name_of(node) for node in answers.counted}
    if run.hides_cohorts:
        return  # a client's figures grow when it is asked
    for node_id, statement in answers.statements.items():
        run.statements[run.name_of(node_id)] = statement


def _named(run: Run, rejection: Rejection) -> dict[str, str]:
    kinds = {REFUSED: "refused", BUDGET_EXHAUSTED: "budget_exhausted", LOST: "lost", LATE: "late"}
    # A reason may tell what was spent, or when the last round was, and so when the client was asked.
    reason = "its reason is not told, since it could tell when it was asked" if run.hides_cohorts else rejection.reason
    return {
        "client": run.name_of(rejection.node_id),
        "kind": kinds.get(rejection.code, "rejected"),
        "reason": reason,
    }
