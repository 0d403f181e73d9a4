//! What the model gets to see of a sample, for people.

use std::fmt::Write;

use super::batch::IGNORE;
use super::sample::Sample;
use crate::tokenizer::Tokenizer;

/// The width of a line, in characters.
const WIDTH: usize = 110;

/// The first three samples: text, then every piece with its id, in runs of what is context and what is supervised.
pub fn render_preview(tokenizer: &Tokenizer, samples: &[Sample]) -> String {
    let mut out = String::new();
    for sample in samples.iter().take(3) {
        let supervised = sample.labels.iter().filter(|&&label| label != IGNORE).count();
        let _ = writeln!(
            out,
            "{}: {} tokens, {supervised} supervised",
            sample.place,
            sample.ids.len()
        );
        let pairs: Vec<(u32, bool)> = sample
            .ids
            .iter()
            .zip(&sample.labels)
            .map(|(&id, &label)| (id, label != IGNORE))
            .collect();
        for run in pairs.chunk_by(|a, b| a.1 == b.1) {
            let _ = writeln!(
                out,
                "  {} ({} tokens)",
                if run[0].1 { "supervised" } else { "context" },
                run.len()
            );
            let mut line = String::from("   ");
            for (id, _) in run {
                let word = format!(
                    " {}:{id}",
                    tokenizer.piece(*id).unwrap_or("(outside the vocabulary)")
                );
                if line.chars().count() + word.chars().count() > WIDTH {
                    let _ = writeln!(out, "{line}");
                    line.truncate(3);
                }
                line += &word;
            }
            let _ = writeln!(out, "{line}");
        }
    }
    out
}
