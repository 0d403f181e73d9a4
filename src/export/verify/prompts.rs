//! What two models are asked: built-in questions with their answers, or records of the user's own.

use std::path::Path;

use serde::Deserialize;

use crate::data::record::{Columns, Record, read_records};
use crate::data::sample::{Options, Sample, encode_all};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// Part of the program: everyday questions, arithmetic, translation, code, writing, half of them in Chinese, with answers as the model
/// would write them. What counts is not that an answer is right, but that both models read the same tokens of it.
const SUITE: &str = include_str!("prompts.jsonl");

/// Prompts that are part of the program.
pub const BUILT_IN: usize = 16;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: String,
    response: String,
}

/// What two models are asked.
#[derive(Debug, Clone)]
pub struct Prompts {
    /// Prompts with the answers that both models are told token by token.
    pub samples: Vec<Sample>,
    /// Does the loss over the answers say something? That of the user's own data does.
    pub with_loss: bool,
}

impl Prompts {
    /// The first `count` built-in ones; `longest` is the longest sequence that the model takes.
    ///
    /// # Errors
    /// There are fewer; the tokenizer cannot encode them.
    pub fn built_in(tokenizer: &Tokenizer, longest: usize, count: usize) -> Result<Self> {
        if count > BUILT_IN {
            return Err(Error::input(
                "--verify-prompts",
                count,
                format!("at most the {BUILT_IN} built-in prompts"),
                "give records of your own with --verify-data FILE",
            ));
        }
        let lines = SUITE.lines().enumerate().take(count);
        let records = lines.filter_map(|(i, line)| {
            // Part of the program and tested: a line that cannot be read would be a bug.
            let Line { prompt, response } = serde_json::from_str(line).ok()?;
            Some(Record {
                prompt,
                response,
                history: Vec::new(),
                place: format!("built-in prompt {}", i + 1),
            })
        });
        Self::of(tokenizer, &records.collect::<Vec<_>>(), longest, false)
    }

    /// The first `count` records of a file, with the same samples and labels as in `glmtune eval`.
    ///
    /// # Errors
    /// The file cannot be read, or a record is none.
    pub fn read(
        path: &Path,
        columns: &Columns,
        tokenizer: &Tokenizer,
        longest: usize,
        count: usize,
    ) -> Result<Self> {
        let (mut records, _) = read_records(path, columns)?;
        records.truncate(count);
        Self::of(tokenizer, &records, longest, true)
    }

    fn of(tokenizer: &Tokenizer, records: &[Record], longest: usize, with_loss: bool) -> Result<Self> {
        let options = Options {
            max_length: Some(longest),
            ..Options::default()
        };
        let (samples, _) = encode_all(tokenizer, records, &options)?;
        Ok(Self { samples, with_loss })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_suite_is_a_prompt_with_an_answer() {
        let lines: Vec<Line> = SUITE
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), BUILT_IN);
        for (i, line) in lines.iter().enumerate() {
            assert!(!line.prompt.is_empty() && !line.response.is_empty());
            assert!(lines[..i].iter().all(|other| other.prompt != line.prompt));
        }
        let chinese = |line: &&Line| line.prompt.chars().any(|c| ('\u{4e00}'..'\u{a000}').contains(&c));
        let count = lines.iter().filter(chinese).count();
        assert!((6..=10).contains(&count), "{count}");
    }
}
