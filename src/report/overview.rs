//! The sections of the report that say what the run was: head, key figures, warnings, resources, hashes, configuration.

use std::fmt::Write;

use serde_json::Value;

use super::escape::Escaped;
use super::folder::RunFiles;
use super::number;
use super::record::{RunRecord, Status};

/// More warnings than these are counted, not shown.
const WARNINGS_SHOWN: usize = 100;

/// Name, status, method, device, date.
pub(super) fn header(page: &mut String, run: &RunFiles) {
    let record = &run.record;
    let (class, status) = match record.status {
        Status::Running => ("running", "running, or killed"),
        Status::Finished => ("finished", "finished"),
        Status::Interrupted => ("interrupted", "interrupted"),
        Status::Failed => ("failed", "failed"),
    };
    let mut facts = Vec::new();
    for fact in [&record.method, &record.model, &record.device, &record.dtype] {
        if !fact.is_empty() {
            facts.push(fact.clone());
        }
    }
    if record.times.started > 0 {
        facts.push(number::date(record.times.started));
    }
    let facts: Vec<String> = facts
        .iter()
        .map(|fact| format!("<li>{}</li>", Escaped(fact)))
        .collect();
    let _ = write!(
        page,
        r#"<header><div class="top"><p class="kicker">glmtune report</p><button id="theme" type="button" hidden="hidden">Theme: system</button></div>
<h1><bdi>{}</bdi> <span class="status {class}">{status}</span></h1>
<ul class="facts">{}</ul></header>
"#,
        Escaped(&run.name),
        facts.concat(),
    );
}

/// The numbers one looks for first.
pub(super) fn key_figures(page: &mut String, run: &RunFiles) {
    let record = &run.record;
    let mut tiles: Vec<(&str, String, String)> = Vec::new();
    let before = record.eval_before.get("eval_loss").and_then(Value::as_f64);
    let series = |name: &str| run.series.iter().find(|series| series.name == name);
    match record.eval_after.get("eval_loss") {
        Some(after) => {
            let note = match before {
                Some(before) => format!("from {}", number::short(before)),
                None => String::new(),
            };
            let after = after.as_f64().unwrap_or(f64::NAN);
            tiles.push(("Evaluation loss", number::short(after), note));
        }
        None => {
            if let Some(last) = series("loss").and_then(|loss| loss.points.last()) {
                let note = format!("at step {}", number::count(last.step));
                tiles.push(("Training loss", number::short(last.value), note));
            }
        }
    }
    if let Some(best) = &record.best {
        let metric = best
            .metric
            .strip_prefix("eval_")
            .unwrap_or(&best.metric)
            .replace('_', " ");
        let note = format!("{metric}, step {}", number::count(best.step));
        tiles.push(("Best", number::short(best.value), note));
    }
    let steps = match record.total_steps {
        0 => String::new(),
        total => format!("of {}", number::count(total)),
    };
    tiles.push(("Steps", number::count(record.steps), steps));
    let times = record.times;
    let all = times.preparing_seconds + times.training_seconds + times.evaluating_seconds;
    if all > 0.0 {
        let training = format!("{} training", number::span(times.training_seconds));
        tiles.push(("Time", number::span(all), training));
    }
    if record.tokens > 0 && times.training_seconds > 0.0 {
        let pace = record.tokens as f64 / times.training_seconds;
        let note = format!("{} tokens", number::scaled(record.tokens));
        tiles.push(("Tokens/s", number::short(pace), note));
    }
    if record.parameters.total > 0 {
        let share = 100.0 * record.parameters.trainable as f64 / record.parameters.total as f64;
        let note = format!(
            "{} % of {}",
            percent(share),
            number::scaled(record.parameters.total)
        );
        tiles.push(("Trained", number::scaled(record.parameters.trainable), note));
    }
    let peak = record.memory.peak_device_bytes.or(record.memory.peak_host_bytes);
    if let Some(peak) = peak {
        let of = if record.memory.peak_device_bytes.is_some() {
            "of the device"
        } else {
            "of the process"
        };
        tiles.push(("Peak memory", number::bytes(peak), of.into()));
    }
    page.push_str("<dl class=\"figures\">");
    for (name, value, note) in tiles {
        let _ = write!(
            page,
            "<div><dt>{name}</dt><dd>{}<small>{}</small></dd></div>",
            Escaped(&value),
            Escaped(&note)
        );
    }
    page.push_str("</dl>\n");
}

/// Two digits that count: `0.059`, `1.3`, `100`.
fn percent(share: f64) -> String {
    let decimals = if share > 0.0 {
        (1.0 - share.log10().floor()).clamp(0.0, 6.0) as usize
    } else {
        0
    };
    format!("{share:.decimals$}")
}

/// The error that ended the run, and what it warned of.
pub(super) fn notices(page: &mut String, record: &RunRecord) {
    if let Some(error) = &record.error {
        let _ = writeln!(
            page,
            r#"<section class="notice failed"><h2>The run failed</h2><p dir="auto">{}</p></section>"#,
            Escaped(error)
        );
    }
    if record.warnings.is_empty() {
        return;
    }
    page.push_str(r#"<section class="notice"><h2>Warnings</h2><ol class="warnings">"#);
    for warning in record.warnings.iter().take(WARNINGS_SHOWN) {
        let step = match warning.step {
            0 => "at the start".to_string(),
            step => format!("step {}", number::count(step)),
        };
        let _ = write!(
            page,
            r#"<li><span class="when">{step}</span> <span dir="auto">{}</span></li>"#,
            Escaped(&warning.text)
        );
    }
    page.push_str("</ol>");
    if record.warnings.len() > WARNINGS_SHOWN {
        let more = (record.warnings.len() - WARNINGS_SHOWN) as u64;
        let _ = write!(
            page,
            "<p>{} more stand in <code>run.json</code>.</p>",
            number::count(more)
        );
    }
    page.push_str("</section>\n");
}

/// Parameters, time and memory.
pub(super) fn resources(page: &mut String, record: &RunRecord) {
    let mut rows: Vec<(String, String)> = Vec::new();
    let parameters = record.parameters;
    if parameters.total > 0 {
        let (trained, total) = (
            number::count(parameters.trainable),
            number::count(parameters.total),
        );
        rows.push(("Trained parameters".into(), format!("{trained} of {total}")));
    }
    let times = record.times;
    for (name, value) in [
        ("Preparing", times.preparing_seconds),
        ("Training", times.training_seconds),
        ("Evaluating", times.evaluating_seconds),
    ] {
        if value > 0.0 {
            rows.push((name.into(), number::seconds(value)));
        }
    }
    if times.updated > 0 {
        rows.push(("Last written".into(), number::date(times.updated)));
    }
    if !record.resumed_at.is_empty() {
        let steps: Vec<String> = record
            .resumed_at
            .iter()
            .map(|step| number::count(*step))
            .collect();
        rows.push(("Resumed after step".into(), steps.join(", ")));
    }
    if let Some(kept) = record.best.as_ref().and_then(|best| best.checkpoint.clone()) {
        rows.push(("Best checkpoint".into(), kept));
    }
    let memory = &record.memory;
    for (name, value) in [
        ("Peak memory of the process", memory.peak_host_bytes),
        ("Peak memory of the device", memory.peak_device_bytes),
    ] {
        if let Some(value) = value {
            rows.push((name.into(), number::bytes(value)));
        }
    }
    for part in &memory.parts {
        rows.push((format!("Memory: {}", part.name), number::bytes(part.bytes)));
    }
    if rows.is_empty() {
        return;
    }
    page.push_str("<section><h2>Size, time and memory</h2><dl class=\"pairs\">");
    for (name, value) in rows {
        let _ = write!(page, "<dt>{}</dt><dd>{}</dd>", Escaped(&name), Escaped(&value));
    }
    page.push_str("</dl></section>\n");
}

/// What went in and came out, by SHA-256.
pub(super) fn hashes(page: &mut String, record: &RunRecord) {
    let mut rows: Vec<(String, String, &str)> = record
        .hashes
        .iter()
        .map(|digest| (digest.of.clone(), digest.path.clone(), digest.sha256.as_str()))
        .collect();
    if let Some(sha256) = &record.program.sha256 {
        let version = format!("glmtune {}", record.program.version);
        rows.push(("program".into(), version, sha256));
    }
    if rows.is_empty() {
        return;
    }
    page.push_str("<section><h2>SHA-256</h2><dl class=\"pairs\">");
    for (of, path, sha256) in rows {
        let _ = write!(
            page,
            r#"<dt>{}</dt><dd><span dir="auto">{}</span><code class="hash">{}</code></dd>"#,
            Escaped(&of),
            Escaped(&path),
            Escaped(sha256)
        );
    }
    page.push_str("</dl></section>\n");
}

/// `run.toml` as it is.
pub(super) fn configuration(page: &mut String, config: &str) {
    if !config.trim().is_empty() {
        let _ = writeln!(
            page,
            r#"<section><h2>Configuration</h2><details><summary>The resolved <code>run.toml</code></summary><pre tabindex="0" dir="auto">{}</pre></details></section>"#,
            Escaped(config.trim_end())
        );
    }
}
