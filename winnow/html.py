"""How a notebook shows a job and its results. Everything that comes from the service is escaped."""

from html import escape

from winnow.answers import Finding, SelectionJob, SelectionResult

_COLOURS = {"ok": "#2e7d32", "look": "#b26a00", "bad": "#c62828"}
_BAR = '<progress value="{done}" max="{total}" style="width:12em"></progress>'


def job(job: SelectionJob) -> str:
    """The job's state, and a bar for each of its stages."""
    rows = "".join(
        _row(stage.stage, _BAR.format(done=stage.done, total=max(stage.total, 1)), f"{stage.done:,} of {stage.total:,}")
        for stage in job.stages or ()
    )
    error = "" if job.error is None else f"<p>{escape(job.error.code)}: {escape(job.error.detail)}</p>"
    return f"<div><p><code>{escape(job.id)}</code>: <b>{escape(job.status)}</b></p><table>{rows}</table>{error}</div>"


def _row(name: str, bar: str, count: str) -> str:
    return f"<tr><td>{escape(name)}</td><td>{bar}</td><td>{count}</td></tr>"


def results(results: SelectionResult) -> str:
    """How much was selected, and the verdict."""
    findings = "".join(map(_finding, results.verdict or ()))
    counts = f"{results.selected_count:,} of {results.sample_count:,} samples selected"
    return f"<div><p><code>{escape(results.job_id)}</code>: {counts}</p><table>{findings}</table></div>"


def _finding(each: Finding) -> str:
    level = f'<td style="color:{_COLOURS.get(each.level, "inherit")}"><b>{escape(each.level)}</b></td>'
    meaning = each.meaning if each.advice is None else f"{each.meaning} {each.advice}"
    return f'<tr>{level}<td>{escape(each.about)}</td><td style="text-align:left">{escape(meaning)}</td></tr>'
