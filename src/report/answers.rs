//! What the model said, before and after, beside what the data says; and the same for the prompts of the forgetting meter.

use std::collections::HashMap;
use std::fmt::Write;

use super::escape::Escaped;
use super::folder::RunFiles;
use super::number;
use super::record::Sample;

/// Prompts shown of each suite; the others stand in `samples.jsonl`.
const PROMPTS: usize = 40;
/// Answers of steps in between shown for each prompt.
const BETWEEN: usize = 20;

/// The samples of each suite: those of the evaluation data, then the others.
pub(super) fn section(page: &mut String, run: &RunFiles) {
    let mut suites: Vec<Option<&str>> = vec![None];
    for sample in &run.samples {
        if !suites.contains(&sample.suite.as_deref()) {
            suites.push(sample.suite.as_deref());
        }
    }
    for suite in suites {
        let prompts = by_prompt(&run.samples, suite);
        if prompts.is_empty() {
            continue;
        }
        let (title, lead) = match suite {
            None => ("Samples", "Answers to evaluation data before and after training."),
            Some("forgetting") => (
                "Forgetting",
                "General prompts that have nothing to do with the training data: what the base answers, and what the \
                 tuned model does. KL is the divergence from the base, in nats a token; 0 is no change.",
            ),
            Some(other) => (other, ""),
        };
        let _ = write!(page, "<section><h2>{}</h2>", Escaped(title));
        if !lead.is_empty() {
            let _ = write!(page, "<p class=\"quiet\">{lead}</p>");
        }
        page.push('\n');
        for samples in prompts.iter().take(PROMPTS) {
            answers(page, samples);
        }
        if prompts.len() > PROMPTS {
            let more = number::count((prompts.len() - PROMPTS) as u64);
            let _ = write!(
                page,
                "<p class=\"quiet\">{more} more prompts stand in <code>samples.jsonl</code>.</p>"
            );
        }
        page.push_str("</section>\n");
    }
}

/// The samples of a suite, those of one prompt together and by step; prompts in the order in which they first appear.
fn by_prompt<'a>(samples: &'a [Sample], suite: Option<&str>) -> Vec<Vec<&'a Sample>> {
    let mut place: HashMap<(&str, Option<&str>), usize> = HashMap::new();
    let mut prompts: Vec<Vec<&Sample>> = Vec::new();
    for sample in samples.iter().filter(|sample| sample.suite.as_deref() == suite) {
        let key = (sample.prompt.as_str(), sample.reference.as_deref());
        let i = *place.entry(key).or_insert_with(|| {
            prompts.push(Vec::new());
            prompts.len() - 1
        });
        prompts[i].push(sample);
    }
    for samples in &mut prompts {
        samples.sort_by_key(|sample| sample.step);
    }
    prompts
}

/// One prompt and its answers side by side.
fn answers(page: &mut String, samples: &[&Sample]) {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
        return;
    };
    page.push_str("<article class=\"sample\"><h3 class=\"label\">Prompt</h3>");
    page.push_str(&said(&last.prompt));
    page.push_str("<div class=\"answers\">");
    let base = samples.iter().rev().find_map(|sample| sample.base.as_deref());
    let mut shown = vec![last.step];
    if let Some(base) = base {
        column(page, "Base model", "before", base);
    } else if first.step < last.step {
        shown.push(first.step);
        column(page, &when(first.step), "before", &first.prediction);
    }
    let mut title = when(last.step);
    if let Some(kl) = last.kl {
        let _ = write!(title, " · KL {}", number::short(kl));
    }
    column(page, &title, "after", &last.prediction);
    if let Some(reference) = &last.reference {
        column(page, "Reference", "reference", reference);
    }
    page.push_str("</div>");

    let between: Vec<_> = samples
        .iter()
        .filter(|sample| !shown.contains(&sample.step))
        .collect();
    if !between.is_empty() {
        let _ = write!(
            page,
            "<details><summary>Answers of other steps ({})</summary>",
            between.len()
        );
        for sample in between.iter().take(BETWEEN) {
            let _ = write!(page, "<h4 class=\"label\">{}</h4>", when(sample.step));
            page.push_str(&said(&sample.prediction));
        }
        if between.len() > BETWEEN {
            page.push_str("<p class=\"quiet\">More stand in <code>samples.jsonl</code>.</p>");
        }
        page.push_str("</details>");
    }
    page.push_str("</article>\n");
}

/// After which step.
fn when(step: u64) -> String {
    match step {
        0 => "Before training".into(),
        step => format!("Step {}", number::count(step)),
    }
}

fn column(page: &mut String, title: &str, class: &str, text: &str) {
    let _ = write!(
        page,
        "<div class=\"{class}\"><h4 class=\"label\">{}</h4>{}</div>",
        Escaped(title),
        said(text)
    );
}

/// A text of the model or of the data. Its direction is its own, and Chinese gets the letter forms of China.
fn said(text: &str) -> String {
    if text.trim().is_empty() {
        return "<p class=\"said nothing\">(empty)</p>".into();
    }
    format!(
        "<p class=\"said\" dir=\"auto\"{}>{}</p>",
        language(text),
        Escaped(text.trim_end())
    )
}

/// The `lang` attribute: browsers choose the forms of shared letters by it.
fn language(text: &str) -> &'static str {
    let has = |range: std::ops::RangeInclusive<char>| text.chars().any(|c| range.contains(&c));
    match (has('\u{3040}'..='\u{30ff}'), has('\u{4e00}'..='\u{9fff}')) {
        (true, _) => " lang=\"ja\"",
        (false, true) => " lang=\"zh-Hans\"",
        (false, false) => "",
    }
}
