//! A result beside what it was made from: both models read the same prompts, and their logits are compared.
//!
//! A merged or converted model that behaves unlike the trained one looks like any other file. So what was written is read back and
//! run beside the reference: the base as it was held in training, with the adapters alive on it. With l the logits of the reference
//! and k those of the result at the positions from which an answer's tokens are predicted:
//!
//! * the largest and the mean `|l - k|`, over positions and classes;
//! * the spread of l: its standard deviation over the classes, as root mean square over the positions. Logits have no unit, so this
//!   is what a difference is measured by;
//! * of adapters, the share of their effect that is kept: see [`Kept`];
//! * the share of positions for which both find the same class most probable, and the mean `KL(softmax l || softmax k)` in nats;
//! * on the user's own data both losses, as `glmtune eval` defines them.
//!
//! No model is ever held: see [`crate::model::sweep`].

mod bound;
mod kept;
mod prompts;
mod tally;
mod verdict;

use std::ops::Range;

use rayon::prelude::*;

pub use self::bound::{Bound, Rounding};
pub use self::kept::Kept;
pub use self::prompts::{BUILT_IN, Prompts};
use self::tally::{Effect, NotANumber, Tally};
pub use self::verdict::Verified;
use crate::data::batch::{Batch, IGNORE};
use crate::data::collate::right_pad;
use crate::data::sample::Sample;
use crate::error::{Error, Result};
use crate::model::sweep::sweep;
pub use crate::model::sweep::{Subject, Swept};
use crate::tensor::{Compute, Tensor};

/// Padded tokens of a batch: activations of more would take more memory than a layer's weights.
const ROWS: usize = 512;
/// Bytes of hidden states that pass through the layers together. More prompts take another turn.
const HIDDEN: usize = 256 << 20;
/// Classes whose logits are held at once.
const PANEL: usize = 4096;

/// How far a result is from what it was made from, over all positions from which a token of an answer is predicted.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Prompts.
    pub prompts: usize,
    /// Positions.
    pub positions: usize,
    /// The largest `|logit - reference logit|`.
    pub max_diff: f64,
    /// Where that is: a record and a token of it.
    pub worst: String,
    /// The mean.
    pub mean_diff: f64,
    /// The standard deviation of the reference's logits over the vocabulary.
    pub spread: f64,
    /// The share of positions for which both find the same token most probable, from 0 to 1.
    pub top1: f64,
    /// Mean `KL(reference || result)`, in nats.
    pub kl: f64,
    /// What is kept of the effect of the reference's adapters, if it has any.
    pub kept: Option<Kept>,
    /// Mean `-ln p` of the supervised tokens, of the reference and of the result.
    pub loss: Option<(f64, f64)>,
}

/// Told of every layer and panel: how much is done, from 0 to 1, and what is at hand. Its error ends the comparison.
pub type Progress<'a> = dyn FnMut(f64, &str) -> Result<()> + 'a;

/// A position from which a token is predicted.
#[derive(Debug, Clone, Copy)]
struct Position {
    /// Its row in the batch.
    row: i32,
    /// Which sample, and which token of it.
    sample: usize,
    token: usize,
    label: Option<usize>,
}

/// Some samples as the models take them.
struct Group {
    batches: Vec<Batch>,
    positions: Vec<Vec<Position>>,
}

/// Runs `prompts` through both models, of which one layer is in memory at a time, and compares their logits. A reference with adapters
/// is also run without them.
///
/// # Errors
/// No prompt; models of different vocabularies; a weight that cannot be read; a number that is none, with the model, the layer or
/// the prompt and the token.
pub fn compare(
    reference: &Subject<'_>,
    result: &Subject<'_>,
    prompts: &Prompts,
    compute: Compute,
    progress: &mut Progress<'_>,
) -> Result<Comparison> {
    let (config, other) = (reference.source.config(), result.source.config());
    let vocabulary = config.vocab_size;
    if other.vocab_size != vocabulary {
        return Err(Error::input(
            result.source.place(crate::checkpoint::WORD_EMBEDDINGS),
            format!("{} tokens", other.vocab_size),
            format!("the {vocabulary} of the reference"),
            "compare models of one vocabulary",
        ));
    }
    let most = HIDDEN / (config.hidden_size * size_of::<f32>());
    let groups = groups(&prompts.samples, config.pad_token_id, most);
    let base = reference.adapters.map(|_| Subject::plain(reference.source));
    let layers = config.num_layers * (1 + usize::from(base.is_some())) + other.num_layers;
    let mut comparing = Comparing {
        samples: &prompts.samples,
        compute,
        panels: (0..vocabulary)
            .step_by(PANEL)
            .map(|first| first..(first + PANEL).min(vocabulary))
            .collect(),
        steps: groups.len() * (layers + vocabulary.div_ceil(PANEL)),
        step: 0,
        progress,
    };
    let mut tallies = Vec::new();
    for group in &groups {
        tallies.extend(comparing.group(reference, result, base.as_ref(), group)?);
    }
    summary(prompts, vocabulary, &tallies, base.is_some()).ok_or_else(|| {
        Error::input(
            "verification",
            "no prompt",
            "at least one",
            "give --verify-data some records",
        )
    })
}

struct Comparing<'a, 'p> {
    samples: &'a [Sample],
    compute: Compute,
    panels: Vec<Range<usize>>,
    steps: usize,
    step: usize,
    progress: &'a mut Progress<'p>,
}

impl Comparing<'_, '_> {
    fn tell(&mut self, what: &str) -> Result<()> {
        (self.progress)(self.step as f64 / self.steps.max(1) as f64, what)?;
        self.step += 1;
        Ok(())
    }

    /// The models over one group.
    fn group(
        &mut self,
        reference: &Subject<'_>,
        result: &Subject<'_>,
        base: Option<&Subject<'_>>,
        group: &Group,
    ) -> Result<Vec<(Position, Tally)>> {
        let mut models = vec![
            self.finals(reference, group, "reference")?,
            self.finals(result, group, "result")?,
        ];
        if let Some(base) = base {
            models.push(self.finals(base, group, "without adapters")?);
        }
        let mut tallies: Vec<Vec<(Position, Tally)>> = group
            .positions
            .iter()
            .map(|positions| positions.iter().map(|&p| (p, Tally::new(p.label))).collect())
            .collect();
        for panel in self.panels.clone() {
            self.tell("vocabulary")?;
            let matrices = models.iter().map(|model| model.swept.panel(panel.clone()));
            let matrices = matrices.collect::<Result<Vec<_>>>()?;
            for (batch, tallies) in tallies.iter_mut().enumerate() {
                let logits = models.iter().zip(&matrices);
                let logits = logits.map(|(model, matrix)| model.swept.logits(&model.x[batch], matrix));
                let logits = logits.collect::<Result<Vec<_>>>()?;
                add(tallies, &panel, &logits).map_err(|(position, found)| {
                    self.not_a_number(&models[found.model].swept, position, found)
                })?;
            }
        }
        Ok(tallies.into_iter().flatten().collect())
    }

    /// The final hidden states of one model at the positions that are compared.
    fn finals<'s>(&mut self, subject: &Subject<'s>, group: &Group, name: &str) -> Result<Finals<'s>> {
        let layers = subject.source.config().num_layers;
        let mut swept = sweep(*subject, self.compute, &group.batches, &mut |layer| {
            self.tell(&format!("{name}, layer {} of {layers}", layer + 1))
        })?;
        let rows = group.positions.iter().enumerate().map(|(batch, positions)| {
            let rows: Vec<i32> = positions.iter().map(|position| position.row).collect();
            swept.positions(batch, &rows)
        });
        let x = rows.collect::<Result<_>>()?;
        swept.hidden.clear();
        Ok(Finals { swept, x })
    }

    fn not_a_number(&self, swept: &Swept<'_>, position: Position, found: NotANumber) -> Error {
        Error::input(
            swept.place_of_head(),
            format!(
                "the logit {} of class {} for {}",
                found.value,
                found.class,
                place(self.samples, position)
            ),
            "a finite number",
            "the file is damaged: check it with `glmtune inspect`, or write it again",
        )
    }
}

struct Finals<'a> {
    swept: Swept<'a>,
    /// `[R, hidden]` of each batch.
    x: Vec<Tensor>,
}

/// "data.json:3, token 17": where people find it.
fn place(samples: &[Sample], position: Position) -> String {
    format!("{}, token {}", samples[position.sample].place, position.token + 1)
}

/// Adds the logits `[R, C]` of two models, or of three, to the tallies of R positions.
fn add(
    tallies: &mut [(Position, Tally)],
    panel: &Range<usize>,
    logits: &[Tensor],
) -> Result<(), (Position, NotANumber)> {
    let width = panel.len();
    // Sums of F64 only come from models that compute in it.
    let logits: Vec<Tensor> = logits
        .iter()
        .map(|logits| logits.to_dtype(crate::tensor::DType::F32))
        .collect();
    let rows: Vec<&[f32]> = logits.iter().map(Tensor::as_slice::<f32>).collect();
    let failures: Vec<_> = tallies
        .par_iter_mut()
        .enumerate()
        .filter_map(|(i, (position, tally))| {
            let row = |model: usize| &rows[model][i * width..(i + 1) * width];
            let base = (rows.len() > 2).then(|| row(2));
            let told = tally.add(panel.start, [row(0), row(1)], base);
            told.err().map(|found| (*position, found))
        })
        .collect();
    failures.into_iter().next().map_or(Ok(()), Err)
}

/// The samples in batches of about equal lengths, and these in groups of at most `most` padded tokens, or of one batch.
fn groups(samples: &[Sample], pad: u32, most: usize) -> Vec<Group> {
    let mut order: Vec<usize> = (0..samples.len()).collect();
    order.sort_by_key(|&i| samples[i].ids.len());
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for i in order {
        let longest = samples[i].ids.len();
        match batches.last_mut() {
            Some(batch) if (batch.len() + 1) * longest <= ROWS => batch.push(i),
            _ => batches.push(vec![i]),
        }
    }
    let mut groups: Vec<Group> = Vec::new();
    let mut rows = 0;
    for numbers in batches {
        let chosen: Vec<&Sample> = numbers.iter().map(|&i| &samples[i]).collect();
        let batch = right_pad(&chosen, pad, None);
        let positions = numbers
            .iter()
            .enumerate()
            .flat_map(|(row, &i)| positions(&samples[i], i, row * batch.len))
            .collect();
        rows += batch.size * batch.len;
        match groups.last_mut() {
            Some(group) if rows <= most => {
                group.batches.push(batch);
                group.positions.push(positions);
            }
            _ => {
                rows = batch.size * batch.len;
                groups.push(Group {
                    batches: vec![batch],
                    positions: vec![positions],
                });
            }
        }
    }
    groups
}

/// From the last token of the context on, which predicts `<sop>`.
fn positions(sample: &Sample, number: usize, first: usize) -> impl Iterator<Item = Position> + '_ {
    (sample.context.saturating_sub(1)..sample.ids.len()).map(move |token| Position {
        row: (first + token) as i32,
        sample: number,
        token,
        label: match sample.labels.get(token + 1) {
            Some(&label) if label != IGNORE => Some(label as usize),
            _ => None,
        },
    })
}

/// `None` without a position.
fn summary(
    prompts: &Prompts,
    vocabulary: usize,
    tallies: &[(Position, Tally)],
    adapted: bool,
) -> Option<Comparison> {
    let samples = &prompts.samples;
    let mut worst = tallies.first()?;
    let positions = tallies.len() as f64;
    let (mut differences, mut variance, mut kl, mut agreed) = (0.0, 0.0, 0.0, 0usize);
    let (mut losses, mut labels) = ([0.0; 2], 0usize);
    let mut effect = Effect::default();
    for entry in tallies {
        let tally = &entry.1;
        if tally.largest > worst.1.largest {
            worst = entry;
        }
        differences += tally.differences;
        variance += tally.variance();
        kl += tally.divergence();
        effect.add(tally.effect);
        agreed += usize::from(tally.agrees());
        if let Some(of_both) = tally.losses() {
            losses = [losses[0] + of_both[0], losses[1] + of_both[1]];
            labels += 1;
        }
    }
    Some(Comparison {
        prompts: samples.len(),
        positions: tallies.len(),
        max_diff: worst.1.largest,
        worst: place(samples, worst.0),
        mean_diff: differences / (positions * vocabulary as f64),
        spread: (variance / positions).sqrt(),
        top1: agreed as f64 / positions,
        kl: kl / positions,
        kept: adapted.then(|| Kept::of(&effect, positions * vocabulary as f64)),
        loss: (prompts.with_loss && labels > 0)
            .then(|| (losses[0] / labels as f64, losses[1] / labels as f64)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(len: usize) -> Sample {
        let ids: Vec<u32> = (0..len as u32).collect();
        Sample {
            labels: ids
                .iter()
                .map(|&id| if id < 4 { IGNORE } else { id as i32 })
                .collect(),
            ids,
            context: 3,
            mask: 2,
            place: String::new(),
        }
    }

    #[test]
    fn every_position_that_predicts_is_in_one_batch_of_one_group() {
        let lengths = [9, 300, 5, 700, 41, 12, 260, 7];
        let samples = lengths.map(sample);
        for most in [1, 600, 1 << 20] {
            let groups = groups(&samples, 3, most);
            assert_eq!(groups.len() == 1, most == 1 << 20);
            let mut seen = Vec::new();
            for group in &groups {
                let rows: usize = group.batches.iter().map(|batch| batch.ids.len()).sum();
                assert!(rows <= most || group.batches.len() == 1, "{rows}");
                for (batch, positions) in group.batches.iter().zip(&group.positions) {
                    assert!(batch.ids.len() <= ROWS || batch.size == 1);
                    for p in positions {
                        assert_eq!(batch.ids[p.row as usize], p.token as i32);
                        let next = batch.labels.get(p.row as usize + 1).copied();
                        let last = p.token + 1 == samples[p.sample].ids.len();
                        let label = next.filter(|&label| label != IGNORE && !last);
                        assert_eq!(p.label, label.map(|label| label as usize));
                        seen.push((p.sample, p.token));
                    }
                }
            }
            seen.sort_unstable();
            let want = (0..lengths.len()).flat_map(|i| (2..lengths[i]).map(move |t| (i, t)));
            assert!(seen.into_iter().eq(want));
        }
    }
}
