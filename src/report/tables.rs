//! The tables of the report: the evaluation before and after, and the metrics step by step.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::escape::Escaped;
use super::folder::RunFiles;
use super::number;

/// A longer table is thinned to about this many rows; all of them stand in `metrics.jsonl`.
const ROWS: usize = 100;
/// Metrics of which less is better; of all others that are named below, more is.
const LESS_IS_BETTER: [&str; 4] = ["loss", "perplexity", "kl", "empty"];
/// Metrics of which more is better.
const MORE_IS_BETTER: [&str; 6] = ["bleu", "rouge", "accuracy", "exact_match", "agreement", "f1"];

/// Metrics before training, at the end, and the change.
pub(super) fn evaluation(page: &mut String, run: &RunFiles) {
    let (before, after) = (&run.record.eval_before, &run.record.eval_after);
    let mut keys: Vec<&String> = after.keys().collect();
    keys.extend(before.keys().filter(|key| !after.contains_key(*key)));
    if keys.is_empty() {
        return;
    }
    page.push_str(
        "<section><h2>Evaluation</h2><div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Evaluation\">\
         <table><thead><tr><th scope=\"col\">Metric</th><th scope=\"col\">Before</th><th scope=\"col\">After</th>\
         <th scope=\"col\">Change</th></tr></thead><tbody>",
    );
    for key in keys {
        let name = key.strip_prefix("eval_").unwrap_or(key);
        let values = (number_at(before, key), number_at(after, key));
        let _ = write!(
            page,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td>{}</tr>",
            Escaped(&name.replace('_', " ")),
            cell(before.get(key)),
            cell(after.get(key)),
            change(name, values),
        );
    }
    page.push_str("</tbody></table></div></section>\n");
}

/// The difference, and whether that is good where we know it.
fn change(name: &str, values: (Option<f64>, Option<f64>)) -> String {
    let (Some(before), Some(after)) = values else {
        return "<td></td>".into();
    };
    let difference = after - before;
    let sign = if difference > 0.0 { "+" } else { "" };
    let is_one_of = |list: &[&str]| list.iter().any(|part| name.contains(part));
    let better = match (is_one_of(&LESS_IS_BETTER), is_one_of(&MORE_IS_BETTER)) {
        (true, false) => Some(difference < 0.0),
        (false, true) => Some(difference > 0.0),
        _ => None,
    };
    let (class, word) = match better {
        _ if difference == 0.0 => ("", ""),
        Some(true) => (" class=\"good\"", " <span class=\"verdict\">better</span>"),
        Some(false) => (" class=\"bad\"", " <span class=\"verdict\">worse</span>"),
        None => ("", ""),
    };
    format!("<td{class}>{sign}{}{word}</td>", number::short(difference))
}

/// The lines with evaluations, or the last lines if there is none.
pub(super) fn metrics(page: &mut String, run: &RunFiles) {
    let evaluated: Vec<&Map<String, Value>> = run
        .rows
        .iter()
        .filter(|row| row.keys().any(|key| key.starts_with("eval_")))
        .collect();
    let (title, mut rows) = if evaluated.is_empty() {
        let last = run.rows.len().saturating_sub(20);
        ("The last logged steps", run.rows[last..].iter().collect())
    } else {
        ("Every evaluation", evaluated)
    };
    if rows.is_empty() {
        return;
    }
    let all = rows.len();
    if all > ROWS {
        let every = all.div_ceil(ROWS);
        let mut i = 0;
        rows.retain(|_| {
            i += 1;
            i == all || (i - 1) % every == 0
        });
    }
    let mut keys: Vec<&str> = Vec::new();
    for row in &rows {
        for (key, value) in *row {
            // A table has room for what everyone reads; parts of a sum are in the curves.
            let shown = (value.is_number() || value.is_null()) && !key.contains('/') && key != "step";
            if shown && !keys.contains(&key.as_str()) {
                keys.push(key);
            }
        }
    }
    keys.sort_by_key(|key| match *key {
        "epoch" => 0,
        "loss" => 1,
        "eval_loss" => 2,
        key if key.starts_with("eval_") => 3,
        _ => 4,
    });
    let _ = write!(
        page,
        "<section><h2>Metrics</h2><details><summary>{title}</summary><div class=\"scroll\" tabindex=\"0\" role=\"region\" \
         aria-label=\"Metrics\"><table><thead><tr><th scope=\"col\">step</th>"
    );
    for key in &keys {
        let _ = write!(page, "<th scope=\"col\">{}</th>", Escaped(&key.replace('_', " ")));
    }
    page.push_str("</tr></thead><tbody>");
    for row in &rows {
        let step = row.get("step").and_then(Value::as_u64).unwrap_or(0);
        let _ = write!(page, "<tr><th scope=\"row\">{}</th>", number::count(step));
        for key in &keys {
            let _ = write!(page, "<td>{}</td>", cell(row.get(*key)));
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table></div>");
    if rows.len() < all {
        let (shown, all) = (number::count(rows.len() as u64), number::count(all as u64));
        let _ = write!(
            page,
            "<p class=\"quiet\">{shown} of {all} lines; <code>metrics.jsonl</code> has all.</p>"
        );
    }
    page.push_str("</details></section>\n");
}

fn number_at(row: &Map<String, Value>, key: &str) -> Option<f64> {
    row.get(key).and_then(Value::as_f64)
}

/// A value: `null` is a number that was not finite, and nothing is nothing.
fn cell(value: Option<&Value>) -> String {
    match value {
        None => String::new(),
        Some(Value::Null) => "<span class=\"lost\">not finite</span>".into(),
        Some(Value::Number(number)) => number::short(number.as_f64().unwrap_or(f64::NAN)),
        Some(other) => Escaped(&other.to_string()).to_string(),
    }
}
