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
from common.wire.records import LOST
from server.rounds import cohort, stopping, strategies
from server.rounds.advice import on_divergence
from server.rounds.aggregation import Aggregator, EachReply, Mean
from server.rounds.cohort import Cohort
from server.rounds.disclosure import SAYS_NO
from server.rounds.round import Answers, Round, RoundFailed, TrainedRound, evaluate_round, train_round
from server.rounds.run import Ending, Event, Run

BUDGETS_SPENT = Ending(
    "budget_exhausted", "the clients that are left are fewer than min_clients, because budgets are spent"
)


def run_rounds(run: Run, grid: Grid, strategy: Strategy, *, wait_s: float | None = None) -> Ending:
    """Runs the rounds that are left.

    Args:
        wait_s: seconds to wait for the quorum before each round; None waits for ever.

    Raises:
        RunFailed: too many failed rounds in a row, or no quorum within `wait_s`.
    """
    federation, progress = run.federation, run.progress
    strategies.restore(strategy, progress.memory)
    if run.central is not None and progress.spent is not None:
        run.central.restore(progress.spent)
    if progress.present:
        cohort.wait_for_those_who_were_here(run, grid)
    if progress.pending:
        assert progress.event is not None
        _complete(run, grid, strategy, progress.event)
    failed, why = 0, ""
    rounds = federation.training.rounds
    # The last one may be tried again.
    first = progress.tried + 1 if progress.round == rounds else min(progress.tried + 1, rounds)
    for number in range(first, rounds + 1):
        if reason := stopping.verdict(run):
            return Ending("completed", reason)
        started = time.monotonic()
        nodes = cohort.wait_for_quorum(run, grid, wait_s)
        if nodes is None:
            return BUDGETS_SPENT
        progress.present = {run.name_of(node) for node in nodes}
        event: Event = {"event": "round", "round": number, "rounds": rounds, "waiting": time.monotonic() - started}
        this = Round(federation=federation, run=run.name, number=number, cohort=cohort.choose(run, nodes, number))
        try:
            trained = _train(run, grid, strategy, this)
        except RoundFailed as failure:
            failed += 1
            event |= _told(run, this, failure.answers, loss=None)
            event["failed"] = failure.reason
            why = failure.reason + _advice(run, failure.answers)
            _write_down_a_failed_round(run, event)
            if cohort.budgets_are_spent(run, grid):
                return BUDGETS_SPENT
            if failed >= federation.strategy.max_failed_rounds:
                raise RunFailed(f"{failed} rounds in a row failed; the last: {why}") from None
            continue
        failed = 0
        event |= _told(run, this, trained.answers, loss=trained.loss)
        progress.state = trained.weights
        progress.round, progress.tried, progress.event = number, number, event
        _complete(run, grid, strategy, event)
    # A run whose last rounds failed has not trained for as many rounds as it says.
    if failed:
        raise RunFailed(f"the last of {rounds} rounds failed: {why}")
    return Ending("completed", stopping.verdict(run))


def _train(run: Run, grid: Grid, strategy: Strategy, this: Round) -> TrainedRound:
    """Trains one round. What it costs whole clients is written down also if it fails, before anything is told."""
    try:
        return train_round(this, run.progress.state, grid=grid, strategy=strategy, aggregator=lambda: _aggregator(run))
    finally:
        run.progress.memory = strategies.memory(strategy)
        _charge(run)


def _charge(run: Run) -> None:
    """Writes down what has been released about whole clients, before it is told."""
    if run.central is not None:
        run.progress.spent = run.central.spent
        run.journal.charge(run)


def _aggregator(run: Run) -> Aggregator:
    if run.central is not None:
        return run.central.aggregator(run.progress.state)
    return Mean(run.progress.state) if run.federation.strategy.name in OF_A_MEAN else EachReply()


def _told(run: Run, this: Round, answers: Answers, *, loss: float | None) -> Event:
    """Draws the conclusions from how a round was answered: who took part, who said no, who is to rest. Returns what an
    event tells of it."""
    _remember(run, this, answers)
    _note_strikes(run, this, answers)
    disclosure = run.disclosure
    rejected = disclosure.rejections(answers.rejected)
    event: Event = {
        "clients": len(disclosure.took_part(this.cohort.nodes, answers.counted)),
        "asked": len(disclosure.took_part(this.cohort.nodes, this.cohort.asked)),
        "train": {"loss": loss},
        "rejected": [disclosure.named(r, run.name_of) for r in rejected],
        "seconds": answers.seconds,
    }
    if not run.progress.advised and any(r.diverged for r in rejected):
        run.progress.advised = True
        event["advice"] = on_divergence(run.federation)
    return event


def _note_strikes(run: Run, this: Round, answers: Answers) -> None:
    for rejection in answers.rejected:  # who said no to training is not asked again
        if rejection.code in SAYS_NO:
            run.progress.gone[rejection.node_id] = rejection.code
    if run.disclosure.hides_replies:
        return  # who rests is not asked, and whom a round asks may not depend on replies
    # Nobody is to blame for a reply that was lost with its link, or that a round did not wait for.
    excused = {r.node_id for r in answers.rejected if r.code == LOST}
    if answers.enough:
        excused |= answers.silent
    cohort.note_strikes(run, this.cohort.asked, set(answers.counted), excused, this.number)


def _remember(run: Run, this: Round, answers: Answers) -> None:
    """Keeps who took part, and what clients stated."""
    run.progress.clients |= {run.name_of(n) for n in run.disclosure.took_part(this.cohort.nodes, answers.counted)}
    for node, statement in run.disclosure.statements(answers.statements).items():
        run.progress.statements[run.name_of(node)] = statement


def _write_down_a_failed_round(run: Run, event: Event) -> None:
    run.progress.tried = event["round"]
    run.journal.save(run)
    if event["round"] < event["rounds"]:
        run.journal.settle()  # what came in counts for nothing, and nobody will ask for it again
    _note_privacy(run, event)
    run.observe(event)


def _complete(run: Run, grid: Grid, strategy: Strategy, event: Event) -> None:
    """Evaluates a round that has trained, if it is one that evaluates, and tells of it.

    Nothing of a round leaves the server before it is saved: a restart would make it again, with other noise. And no
    client forgets a reply before: a restart may ask for it.
    """
    progress = run.progress
    if run.federation.evaluates(progress.round):
        progress.pending = True
        run.journal.save(run)
        run.journal.settle()
        _evaluate(run, grid, strategy, event)
    progress.pending = False
    if run.held_out is not None:
        event["held_out"] = progress.held_out_score = run.held_out(progress.state)
    _note_privacy(run, event)
    run.journal.save(run)
    run.journal.settle()
    run.observe(event)


def _evaluate(run: Run, grid: Grid, strategy: Strategy, event: Event) -> None:
    """Lets every client that can be asked score the model."""
    progress, nodes = run.progress, cohort.present(run, grid)
    if not nodes:
        return
    everyone = Cohort(nodes, nodes, needed=len(nodes))
    this = Round(federation=run.federation, run=run.name, number=progress.round, cohort=everyone)
    evaluated = evaluate_round(this, progress.state, grid=grid, strategy=strategy, central=run.central)
    _charge(run)
    _remember(run, this, evaluated.answers)
    if (evaluation := evaluated.metrics) is not None:
        event["evaluation"] = evaluation
        progress.evaluation = evaluation or progress.evaluation or {}
        stopping.note(run, evaluation)
    told = run.disclosure.rejections(evaluated.answers.rejected)
    event["rejected"] += [run.disclosure.named(r, run.name_of) for r in told]
    event["seconds"] += evaluated.answers.seconds


def _note_privacy(run: Run, event: Event) -> None:
    if (epsilon := run.epsilon) is not None:
        event["privacy"] = {"row": {"epsilon": epsilon, "per_client": run.epsilon_per_client}}
    if run.central is not None:
        event.setdefault("privacy", {})["client"] = {"epsilon": run.central.epsilon}


def _advice(run: Run, answers: Answers) -> str:
    """Only by what may be told: that a reply diverged would tell that it was asked for."""
    diverged = any(r.diverged for r in run.disclosure.rejections(answers.rejected))
    return f"; {on_divergence(run.federation)}" if diverged else ""
