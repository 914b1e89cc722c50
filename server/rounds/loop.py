"""The round loop: wait, sample, send, admit, aggregate, evaluate, save.

It drives Flower's public Strategy methods, so any Flower strategy works unchanged, but not Flower's own
`Strategy.start`, which cannot resume or stop early, ends a run without a single reply as a success, and averages
whatever arrives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.document.strategy import OF_A_MEAN
from common.errors import RunFailed
from common.model.energy import Energy, sum_of
from common.model.scores import Counts, gaps_between, headlines_of
from common.wire.records import LOST
from server.rounds import cohort, plateau, stopping, strategies
from server.rounds.advice import on_divergence
from server.rounds.aggregation import Aggregator, EachReply, Mean
from server.rounds.cohort import Cohort
from server.rounds.disclosure import SAYS_NO
from server.rounds.events import RoundEnded
from server.rounds.round import Answers, Round, RoundFailed, TrainedRound, count_noise, evaluate_round, train_round
from server.rounds.run import Ending, Run

MOST_TOLD = 100  # clients of which each round's event tells by name; of more, only what the run leaves behind does
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the figures of many clients


def run_rounds(run: Run, grid: Grid, strategy: Strategy, *, wait_s: float | None = None) -> Ending:
    """Runs the rounds that are left.

    Args:
        wait_s: seconds to wait for the quorum before each round; None waits for ever.

    Raises:
        RunFailed: too many failed rounds in a row, or no quorum within `wait_s`.
    """
    federation, progress = run.federation, run.progress
    strategies.restore(strategy, progress.memory)
    if run.client_privacy is not None and progress.spent is not None:
        run.client_privacy.restore(progress.spent)
    if progress.present:
        cohort.wait_for_those_who_were_here(run, grid)
    if progress.pending:
        assert progress.event is not None
        _complete(run, grid, strategy, progress.event)
    failed, why = 0, ""
    before: list[int] = []
    rounds = federation.training.rounds
    # The last one may be tried again.
    first = progress.tried + 1 if progress.round == rounds else min(progress.tried + 1, rounds)
    for number in range(first, rounds + 1):
        if reason := stopping.verdict(run):
            return Ending("completed", reason)
        started = time.monotonic()
        nodes = cohort.wait_for_quorum(run, grid, wait_s)
        if nodes is None:
            return _spent(run)
        if nodes != before:  # of many, their names take longer than a small model's round
            before, progress.present = nodes, {run.name_of(node) for node in nodes}
        waited = time.monotonic() - started
        this = Round(
            federation=federation,
            run=run.name,
            number=number,
            complete=progress.round,
            cohort=cohort.choose(run, nodes, number),
            rate_factor=plateau.factor(run, "training"),
            server_step=_server_step(run, number),
        )
        try:
            trained = _train(run, grid, strategy, this)
        except RoundFailed as failure:
            failed += 1
            event = _told(run, this, failure.answers, waited)
            why = failure.reason + _advice(run, failure.answers)
            _write_down_a_failed_round(run, replace(event, failed=failure.reason))
            if cohort.budgets_are_spent(run, grid):
                return _spent(run)
            if failed >= federation.strategy.max_failed_rounds:
                raise RunFailed(f"{failed} rounds in a row failed; the last: {why}") from None
            continue
        failed = 0
        event = replace(_told(run, this, trained.answers, waited), loss=trained.loss)
        progress.advance(trained.weights, forgetting=federation.strategy.average)
        progress.round, progress.tried, progress.event = number, number, event
        _complete(run, grid, strategy, event)
    # A run whose last rounds failed has not trained for as many rounds as it says.
    if failed:
        raise RunFailed(f"the last of {rounds} rounds failed: {why}")
    return Ending("completed", stopping.verdict(run))


def _server_step(run: Run, number: int) -> float:
    """How much of the strategy's step a round takes."""
    schedule = run.federation.strategy.schedule
    if schedule is None:
        return 1.0
    return schedule.at(number, rounds=run.federation.training.rounds) * plateau.factor(run, "strategy")


def _spent(run: Run) -> Ending:
    names = ", ".join(cohort.whose_budgets_are_spent(run))
    reason = f"the clients that are left are fewer than min_clients, because budgets are spent: {names}"
    return Ending("budget_exhausted", reason)


def _train(run: Run, grid: Grid, strategy: Strategy, this: Round) -> TrainedRound:
    """Trains one round. What it costs whole clients is written down also if it fails, before anything is told."""
    try:
        return train_round(
            this, run.progress.weights, grid=grid, strategy=strategy, aggregator=lambda: _aggregator(run)
        )
    finally:
        run.progress.memory = strategies.memory(strategy)
        _charge(run)


def _charge(run: Run) -> None:
    """Writes down what has been released about whole clients, before it is told."""
    if run.client_privacy is not None:
        run.progress.spent = run.client_privacy.spent
        run.journal.charge(run)


def _aggregator(run: Run) -> Aggregator:
    if run.client_privacy is not None:
        return run.client_privacy.aggregator(run.progress.weights)
    return Mean(run.progress.weights) if run.federation.strategy.name in OF_A_MEAN else EachReply()


def _told(run: Run, this: Round, answers: Answers, waited: float) -> RoundEnded:
    """Draws the conclusions from how a round was answered: who took part, who said no, who is to rest. Returns what may
    be told of it."""
    _remember(run, this, answers)
    _note_strikes(run, this, answers)
    progress, disclosure = run.progress, run.disclosure
    rejected = disclosure.rejections(answers.rejected)
    advice = ""
    if not progress.advised and any(r.diverged for r in rejected):
        progress.advised, advice = True, on_divergence(run.federation)
    members = disclosure.took_part(this.cohort.nodes, answers.counted)
    return RoundEnded(
        round=this.number,
        rounds=run.federation.training.rounds,
        waiting=waited,
        clients=len(members),
        asked=len(disclosure.took_part(this.cohort.nodes, this.cohort.asked)),
        members=tuple(sorted(map(run.name_of, members))) if len(members) <= MOST_TOLD else (),
        rejected=tuple(disclosure.named(r, run.name_of) for r in rejected),
        strikes={run.name_of(node): strikes for node, strikes in progress.strikes.items()},
        seconds=answers.seconds,
        times=disclosure.times(_times(answers)),
        energy=answers.energy.told if answers.energy is not None else {},
        advice=advice,
    )


def _times(answers: Answers) -> dict[str, float]:
    """What a round's seconds went to."""
    transfer = min(answers.transfer, max(answers.seconds - answers.aggregation, 0.0))
    work = max(answers.seconds - answers.aggregation - transfer, 0.0)
    return {"clients": work, "transfer": transfer, "aggregation": answers.aggregation}


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


def _write_down_a_failed_round(run: Run, event: RoundEnded) -> None:
    run.progress.tried = event.round
    run.journal.save(run)
    if event.round < event.rounds:
        run.journal.settle()  # what came in counts for nothing, and nobody will ask for it again
    run.observe(replace(event, privacy=_privacy(run)))


def _complete(run: Run, grid: Grid, strategy: Strategy, event: RoundEnded) -> None:
    """Evaluates a round that has trained, if it is one that evaluates, and tells of it.

    Nothing of a round leaves the server before it is saved: a restart would make it again, with other noise. And no
    client forgets a reply before: a restart may ask for it.
    """
    progress = run.progress
    if run.federation.evaluates(progress.round):
        progress.pending = True
        run.journal.save(run)
        run.journal.settle()
        event = _evaluate(run, grid, strategy, event)
    progress.pending = False
    if run.held_out is not None:
        progress.held_out_score = run.held_out(progress.model)
        event = replace(event, held_out=progress.held_out_score)
    progress.event = event = replace(event, privacy=_privacy(run))
    run.journal.save(run)
    run.journal.settle()
    run.observe(event)


def _evaluate(run: Run, grid: Grid, strategy: Strategy, event: RoundEnded) -> RoundEnded:
    """Lets every client that can be asked score the model. Returns the event with what came of it."""
    progress, nodes = run.progress, cohort.present(run, grid)
    if not nodes:
        return event
    everyone = Cohort(nodes, nodes, needed=len(nodes))
    this = Round(
        federation=run.federation,
        run=run.name,
        number=progress.round,
        complete=progress.round,
        cohort=everyone,
    )
    evaluated = evaluate_round(this, progress.model, grid=grid, strategy=strategy, client_privacy=run.client_privacy)
    _charge(run)
    _remember(run, this, evaluated.answers)
    if (evaluation := evaluated.metrics) is not None:
        if evaluation:
            evaluation |= _of_clients(run, evaluated.counts)
        progress.evaluation = evaluation or progress.evaluation or {}
        stopping.note(run, evaluation)
        plateau.note(run, evaluation)
    told = run.disclosure.rejections(evaluated.answers.rejected)
    took = sum_of(Energy.of(event.energy) if event.energy else None, evaluated.answers.energy)
    times = {**event.times, "evaluation": evaluated.answers.seconds}
    return replace(
        event,
        evaluation=evaluation,
        times=run.disclosure.times(times),
        energy=took.told if took is not None else {},
        rejected=(*event.rejected, *(run.disclosure.named(r, run.name_of) for r in told)),
        seconds=event.seconds + evaluated.answers.seconds,
    )


def _of_clients(run: Run, counts: Mapping[int, Counts]) -> dict[str, Any]:
    """Each client's accuracy or mae, or of many how they spread, and the gaps between clients."""
    if not counts:
        return {}
    schema = run.federation.data_schema
    headlines = headlines_of(np.array([*counts.values()]), schema).tolist()
    counted = {node: value for node, value in zip(counts, headlines, strict=True) if not math.isnan(value)}
    if not counted:
        return {}
    if len(counted) > MOST_TOLD:
        return {"spread": np.quantile(list(counted.values()), QUANTILES).tolist()}
    metric, by_name = run.federation.metrics[0], dict(sorted((run.name_of(node), node) for node in counted))
    told: dict[str, Any] = {"per_client": {name: {metric: counted[node]} for name, node in by_name.items()}}
    named = {name: counts[node] for name, node in by_name.items()}
    if found := gaps_between(named, schema, noise=count_noise(run.federation, 1)):
        told["gaps_between_clients"] = found
    return told


def _privacy(run: Run) -> dict[str, dict[str, Any]]:
    """Epsilon so far, for each unit that is protected."""
    spent: dict[str, dict[str, Any]] = {}
    if (epsilon := run.epsilon) is not None:
        spent["row"] = {"epsilon": epsilon}
        if len(run.progress.statements) <= MOST_TOLD:
            spent["row"]["per_client"] = run.epsilon_per_client
    if run.client_privacy is not None:
        spent["client"] = {"epsilon": run.client_privacy.epsilon}
    return spent


def _advice(run: Run, answers: Answers) -> str:
    """Only by what may be told: that a reply diverged would tell that it was asked for."""
    diverged = any(r.diverged for r in run.disclosure.rejections(answers.rejected))
    return f"; {on_divergence(run.federation)}" if diverged else ""
