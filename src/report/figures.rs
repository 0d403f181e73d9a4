//! Which curves of a run stand in which chart.

use std::collections::BTreeSet;

use super::curves::{Chart, Line};
use super::number;
use super::record::RunRecord;
use super::series::Series;

/// Counters and clocks: numbers that say where a line stands, not how training goes.
const NOT_CURVES: [&str; 3] = ["epoch", "tokens", "samples"];

/// What scatters from batch to batch.
const NOISY: [&str; 3] = ["loss", "grad_norm", "tokens_per_second"];

/// The charts of a run, the loss first.
pub(super) fn charts(series: &[Series], record: &RunRecord) -> Vec<Chart> {
    let series: Vec<&Series> = series
        .iter()
        .filter(|series| !NOT_CURVES.contains(&series.name.as_str()))
        .collect();
    let mut names: Vec<String> = ["loss", "learning_rate", "grad_norm"].map(String::from).into();
    for series in &series {
        let name = chart_of(&series.name);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let all_steps = || series.iter().flat_map(|s| &s.points).map(|point| point.step);
    let steps = (all_steps().min().unwrap_or(0), all_steps().max().unwrap_or(0));
    let mut marks: Vec<(u64, String)> = Vec::new();
    for step in &record.resumed_at {
        marks.push((
            *step,
            format!("interrupted and resumed after step {}", number::count(*step)),
        ));
    }

    let mut files = BTreeSet::new();
    names
        .iter()
        .filter_map(|name| {
            let mut lines: Vec<Line> = series
                .iter()
                .filter(|series| chart_of(&series.name) == *name)
                .map(|series| Line {
                    label: label(&series.name),
                    points: series.points.clone(),
                    sparse: series.name.starts_with("eval_"),
                    noisy: NOISY.contains(&series.name.as_str()),
                })
                .collect();
            // The training loss before the evaluation's, whatever was logged first.
            lines.sort_by_key(|line| name == "loss" && line.sparse);
            if lines.is_empty() {
                return None;
            }
            let mut file = file_name(name);
            while !files.insert(file.clone()) {
                file.push('_');
            }
            Some(Chart {
                name: file,
                title: title(name),
                lines,
                log_from: match name.as_str() {
                    "learning_rate" => f64::INFINITY,
                    "grad_norm" | "grad_norm_by_part" => 50.0,
                    _ => 1000.0,
                },
                steps,
                marks: marks.clone(),
            })
        })
        .collect()
}

/// The chart that shows a key of `metrics.jsonl`.
fn chart_of(key: &str) -> String {
    let scores = ["eval_bleu", "eval_rouge"];
    if key == "eval_loss" {
        "loss".into()
    } else if scores.iter().any(|score| key.starts_with(score)) {
        "eval_scores".into()
    } else if let Some((group, _)) = key.split_once('/') {
        format!("{group}_by_part")
    } else {
        key.into()
    }
}

/// The heading of a chart; what we have no name for is called by its key.
fn title(chart: &str) -> String {
    let known = [
        ("loss", "Loss"),
        ("learning_rate", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("grad_norm_by_part", "Gradient norm by part"),
        ("eval_scores", "BLEU and ROUGE of the evaluation"),
        ("tokens_per_second", "Tokens per second"),
        ("loss_scale", "Loss scale (fp16)"),
        ("overflows", "Overflows (fp16)"),
        ("kl", "KL divergence from the base"),
        ("eval_kl", "KL divergence from the base"),
        ("eval_base_agreement", "Agreement with the base"),
        ("forgetting_kl", "KL divergence from the base"),
        ("forgetting_by_part", "Forgetting"),
        ("kl_by_part", "KL divergence from the base, by part"),
        ("eval_perplexity", "Perplexity of the evaluation"),
        ("eval_accuracy", "Accuracy of the evaluation"),
        ("eval_token_accuracy", "Token accuracy of the evaluation"),
        ("eval_exact_match", "Exact match of the evaluation"),
    ];
    let found = known.iter().find(|(name, _)| *name == chart);
    found.map_or_else(|| chart.to_string(), |(_, title)| (*title).to_string())
}

/// A line in the legend.
fn label(key: &str) -> String {
    match key {
        "loss" => "training".into(),
        "eval_loss" => "evaluation".into(),
        _ => match key.split_once('/') {
            Some((_, part)) => part.to_string(),
            None => key.strip_prefix("eval_").unwrap_or(key).replace('_', " "),
        },
    }
}

/// Letters, digits and marks that any file system takes.
fn file_name(chart: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    let name: String = chart
        .chars()
        .map(|c| if plain(c) { c } else { '_' })
        .take(80)
        .collect();
    if name.is_empty() { "_".into() } else { name }
}
