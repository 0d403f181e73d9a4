//! Samples: a record as token ids and labels, no longer than allowed, every cut counted.

use std::fmt;

use rayon::prelude::*;

use super::batch::IGNORE;
use super::record::Record;
use super::template;
use crate::error::{Error, Result};
use crate::tokenizer::{Tokenizer, longest_first};

/// `prompt [gMASK] <sop> answer <eop>`, not padded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Token ids.
    pub ids: Vec<u32>,
    /// `ids` where supervised, else [`IGNORE`]; not shifted.
    pub labels: Vec<i32>,
    /// Context length: index of the first `<sop>`.
    pub context: usize,
    /// Index of the first `[gMASK]`: the position of all that is generated.
    pub mask: usize,
    /// Where the record came from.
    pub place: String,
}

/// The first token that is a target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FirstTarget {
    /// `<sop>`, predicted at `[gMASK]`: as THUDM's `ptuning/main.py`, so that losses compare with published ones. The
    /// model always predicts it right after a few steps, so it lowers the loss a little and teaches nothing.
    #[default]
    Sop,
    /// The first token of the answer.
    Answer,
}

/// What happens to a record that is too long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OverLength {
    /// The oldest turns are dropped. If the question alone is too long it loses its beginning, and the answer its end;
    /// such an answer has no `<eop>`, since it does not end there.
    #[default]
    Cut,
    /// The oldest turns are dropped; a record that is still too long is left out.
    Drop,
    /// The run stops, naming the record.
    Error,
    /// As THUDM's `ptuning/main.py`: the prompt, turns and all, loses its end, the answer too, and gets an `<eop>`.
    Official,
}

/// How records become samples.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// The first supervised token.
    pub first_target: FirstTarget,
    /// Longest prompt in tokens, `[gMASK]` included.
    pub max_source_length: Option<usize>,
    /// Longest answer in tokens, `<sop>` and `<eop>` included.
    pub max_target_length: Option<usize>,
    /// Longest sample in tokens. Question and answer give way token by token, the longer first.
    pub max_length: Option<usize>,
    /// What happens beyond.
    pub over_length: OverLength,
}

impl Options {
    /// Fails when a limit leaves no room for a token of the question and one of the answer.
    pub fn validate(&self) -> Result<()> {
        for (flag, value, least) in [
            ("--max-source-length", self.max_source_length, 2),
            ("--max-target-length", self.max_target_length, 3),
            ("--max-length", self.max_length, 5),
        ] {
            if let Some(value) = value.filter(|&value| value < least) {
                return Err(Error::Usage(format!(
                    "{flag} is {value}, expected at least {least}"
                )));
            }
        }
        Ok(())
    }

    /// How many tokens of a prompt of `prompt` and an answer of `answer` tokens may stay.
    fn room(&self, prompt: usize, answer: usize) -> (usize, usize) {
        let prompt = prompt.min(
            self.max_source_length
                .map_or(usize::MAX, |most| most.saturating_sub(1)),
        );
        let answer = answer.min(
            self.max_target_length
                .map_or(usize::MAX, |most| most.saturating_sub(2)),
        );
        longest_first(
            prompt,
            answer,
            self.max_length.map_or(usize::MAX, |most| most.saturating_sub(3)),
        )
    }
}

/// What was taken away from a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// So many of the oldest turns.
    Turns(usize),
    /// So many tokens of the question (in [`OverLength::Official`] of the prompt).
    Prompt(usize),
    /// So many tokens of the answer.
    Answer(usize),
    /// All of it: so many tokens beyond the limits.
    Record(usize),
    /// Nothing; but a special token stands written out in its text, and will be taken as such.
    SpecialToken,
}

/// Everything that was not taken as it stands, with its place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Number of records.
    pub records: usize,
    /// Number of samples.
    pub samples: usize,
    /// Each cut and its record's place.
    pub cuts: Vec<(String, Cut)>,
}

impl Report {
    /// One line for each kind of cut that occurred: how many records, how much, and where first.
    pub fn lines(&self) -> Vec<String> {
        let amount = |cut: Cut, kind: usize| match (cut, kind) {
            (Cut::Turns(n), 0) | (Cut::Prompt(n), 1) | (Cut::Answer(n), 2) | (Cut::Record(n), 3) => Some(n),
            (Cut::SpecialToken, 4) => Some(1),
            _ => None,
        };
        let kinds = [
            ("lost their oldest turns", "turns"),
            ("lost part of their question", "tokens"),
            ("lost the end of their answer", "tokens"),
            ("were left out", "tokens too long"),
            ("hold a special token such as <sop> written out", "times"),
        ];
        let mut lines = Vec::new();
        for (kind, (what, unit)) in kinds.into_iter().enumerate() {
            let hits: Vec<(&str, usize)> = self
                .cuts
                .iter()
                .filter_map(|(place, cut)| Some((place.as_str(), amount(*cut, kind)?)))
                .collect();
            if !hits.is_empty() {
                let total: usize = hits.iter().map(|hit| hit.1).sum();
                let first = hits
                    .iter()
                    .take(3)
                    .map(|hit| hit.0)
                    .collect::<Vec<_>>()
                    .join(", ");
                let more = if hits.len() > 3 { ", ..." } else { "" };
                let records = self.records;
                lines.push(format!(
                    "{} of {records} records {what} ({total} {unit}): {first}{more}",
                    hits.len()
                ));
            }
        }
        lines
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} samples of {} records", self.samples, self.records)?;
        self.lines().iter().try_for_each(|line| write!(f, "\n{line}"))
    }
}

/// All records as samples, in their order, and what was cut.
///
/// # Errors
/// Limits that leave no room; a record that is too long with [`OverLength::Error`]; no sample left.
pub fn encode_all(
    tokenizer: &Tokenizer,
    records: &[Record],
    options: &Options,
) -> Result<(Vec<Sample>, Report)> {
    options.validate()?;
    let encoded: Vec<_> = records
        .par_iter()
        .map(|record| encode(tokenizer, record, options))
        .collect::<Result<_>>()?;
    let mut report = Report {
        records: records.len(),
        ..Report::default()
    };
    let mut samples = Vec::with_capacity(records.len());
    for (record, (sample, cuts)) in records.iter().zip(encoded) {
        samples.extend(sample);
        report
            .cuts
            .extend(cuts.into_iter().map(|cut| (record.place.clone(), cut)));
    }
    report.samples = samples.len();
    if let (Some(record), true) = (records.first(), samples.is_empty()) {
        let found = format!("{} records, every one longer than the limits", records.len());
        return Err(Error::input(
            &record.place,
            found,
            "one that fits",
            "raise --max-length or use --over-length cut",
        ));
    }
    Ok((samples, report))
}

/// One record as a sample (`None`: left out), and what was cut.
pub fn encode(
    tokenizer: &Tokenizer,
    record: &Record,
    options: &Options,
) -> Result<(Option<Sample>, Vec<Cut>)> {
    let answer = tokenizer.encode(&record.response);
    let mut dropped = 0;
    let prompt = loop {
        let prompt = tokenizer.encode(&template::prompt(&record.prompt, &record.history[dropped..]));
        let fits = options.room(prompt.len(), answer.len()) == (prompt.len(), answer.len());
        let keeps_turns = matches!(options.over_length, OverLength::Official | OverLength::Error);
        if fits || keeps_turns || dropped == record.history.len() {
            break prompt;
        }
        dropped += 1;
    };
    let (sample, mut cuts) = encode_ids(tokenizer, prompt, answer, &record.place, options)?;
    if dropped > 0 && sample.is_some() {
        cuts.insert(0, Cut::Turns(dropped));
    }
    Ok((sample, cuts))
}

/// A rendered prompt and an answer, both as ids, as a sample: the part of [`encode`] after the template and the turns.
pub fn encode_ids(
    tokenizer: &Tokenizer,
    mut prompt: Vec<u32>,
    mut answer: Vec<u32>,
    place: &str,
    options: &Options,
) -> Result<(Option<Sample>, Vec<Cut>)> {
    let special = tokenizer.special();
    let mut cuts = Vec::new();
    let named = [special.sop, special.eop, special.pad, special.mask];
    if prompt.iter().chain(&answer).any(|id| named.contains(id)) {
        cuts.push(Cut::SpecialToken);
    }
    let (keep_prompt, keep_answer) = options.room(prompt.len(), answer.len());
    let (from_prompt, from_answer) = (prompt.len() - keep_prompt, answer.len() - keep_answer);
    let too_long = from_prompt + from_answer;
    if too_long > 0 {
        match options.over_length {
            OverLength::Drop => return Ok((None, vec![Cut::Record(too_long)])),
            OverLength::Error => {
                let found = format!(
                    "a question of {} and an answer of {} tokens",
                    prompt.len(),
                    answer.len()
                );
                let expected = format!("at most {keep_prompt} and {keep_answer}");
                let remedy = "raise --max-length, or use --over-length cut or drop";
                return Err(Error::input(place, found, expected, remedy));
            }
            OverLength::Cut => drop(prompt.drain(..from_prompt)),
            OverLength::Official => prompt.truncate(keep_prompt),
        }
        answer.truncate(keep_answer);
    }
    let mut ids = tokenizer.build_inputs(&prompt, Some(&answer));
    if from_prompt > 0 {
        cuts.push(Cut::Prompt(from_prompt));
    }
    if from_answer > 0 {
        cuts.push(Cut::Answer(from_answer));
        if options.over_length == OverLength::Cut {
            ids.pop();
        }
    }
    let index_of = |id| ids.iter().position(|&x| x == id).unwrap_or_default();
    let (context, mask) = (index_of(special.sop), index_of(special.gmask));
    let first = context + usize::from(options.first_target == FirstTarget::Answer);
    let labels = ids
        .iter()
        .enumerate()
        .map(|(i, &id)| if i < first { IGNORE } else { id as i32 })
        .collect();
    Ok((
        Some(Sample {
            ids,
            labels,
            context,
            mask,
            place: place.to_string(),
        }),
        cuts,
    ))
}
