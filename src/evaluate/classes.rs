//! Classification: data whose answers are a few labels.
//!
//! The class of a record is the label that the model finds most probable as the whole answer,
//! `argmax_label ln P(label <eop> | prompt)`, where `ln P` is the *sum* of the tokens' log-probabilities. With `<eop>` the
//! labels' probabilities are those of the answers a model would sample, and no label is a beginning of another; a mean per
//! token would favour labels of many tokens, whose later tokens follow from the first. [`of_answers`] instead
//! takes the label that the model wrote.

use serde_json::{Value, json};

use super::answers::{Prediction, Question, same};
use super::loss::not_finite;
use crate::data::batch::IGNORE;
use crate::data::collate::right_pad;
use crate::data::sample::Sample;
use crate::error::{Error, Result};
use crate::model::{Model, Workspace};
use crate::tokenizer::Tokenizer;

/// How often which class was taken for which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classification {
    /// The classes.
    pub labels: Vec<String>,
    /// `confusion[i][j]`: records of class i that were taken for class j; the last column counts answers that are no label.
    pub confusion: Vec<Vec<usize>>,
}

/// How well one class is found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassScores {
    /// The share of what was taken for this class that is of it; 0 where nothing was.
    pub precision: f64,
    /// The share of this class that was taken for it; 0 where there is none.
    pub recall: f64,
    /// `2 p r / (p + r)`; 0 where both are.
    pub f1: f64,
    /// The number of records of this class.
    pub records: usize,
}

impl Classification {
    /// Nothing counted yet.
    fn new(labels: &[String]) -> Self {
        Self {
            labels: labels.to_vec(),
            confusion: vec![vec![0; labels.len() + 1]; labels.len()],
        }
    }

    /// The number of records.
    pub fn records(&self) -> usize {
        self.confusion.iter().flatten().sum()
    }

    /// The share of records taken for what they are; 0 of none.
    pub fn accuracy(&self) -> f64 {
        let right: usize = (0..self.labels.len()).map(|i| self.confusion[i][i]).sum();
        ratio(right, self.records())
    }

    /// Precision, recall and F1 of each class.
    pub fn classes(&self) -> Vec<ClassScores> {
        (0..self.labels.len())
            .map(|i| {
                let hits = self.confusion[i][i];
                let records: usize = self.confusion[i].iter().sum();
                let taken: usize = self.confusion.iter().map(|row| row[i]).sum();
                ClassScores {
                    precision: ratio(hits, taken),
                    recall: ratio(hits, records),
                    // 2 p r / (p + r), the fractions multiplied out.
                    f1: ratio(2 * hits, taken + records),
                    records,
                }
            })
            .collect()
    }

    /// The mean F1 of all classes, every class weighing the same.
    pub fn macro_f1(&self) -> f64 {
        let classes = self.classes();
        classes.iter().map(|class| class.f1).sum::<f64>() / classes.len() as f64
    }

    /// Everything as JSON, for the metrics of an evaluation.
    pub fn to_json(&self) -> Value {
        let classes: Vec<Value> = self
            .labels
            .iter()
            .zip(self.classes())
            .map(|(label, class)| {
                json!({
                    "label": label,
                    "precision": class.precision,
                    "recall": class.recall,
                    "f1": class.f1,
                    "records": class.records,
                })
            })
            .collect();
        json!({
            "accuracy": self.accuracy(),
            "macro_f1": self.macro_f1(),
            "classes": classes,
            "confusion": self.confusion,
        })
    }
}

fn ratio(part: usize, of: usize) -> f64 {
    if of == 0 { 0.0 } else { part as f64 / of as f64 }
}

/// The distinct references of `questions`, in the order of their first appearance, if there are at most `most`.
pub fn labels_of(questions: &[Question], most: usize) -> Option<Vec<String>> {
    let mut labels: Vec<String> = Vec::new();
    for question in questions {
        if !labels.iter().any(|label| same(label, &question.reference)) {
            if labels.len() == most {
                return None;
            }
            labels.push(question.reference.trim().to_string());
        }
    }
    Some(labels)
}

/// The class of each reference, by its place among `labels`.
fn truths(references: impl Iterator<Item = (String, String)>, labels: &[String]) -> Result<Vec<usize>> {
    references
        .map(|(place, reference)| {
            labels
                .iter()
                .position(|label| same(label, &reference))
                .ok_or_else(|| {
                    Error::input(
                        place,
                        format!("the answer {:?}", reference.trim()),
                        format!("one of the labels {}", labels.join(", ")),
                        "add it to --labels, or mend the record",
                    )
                })
        })
        .collect()
}

/// What the model wrote, taken as a class: `references[i]` is answered by `predictions[i]`.
///
/// # Errors
/// A reference that is no label.
pub fn of_answers(predictions: &[Prediction], labels: &[String]) -> Result<Classification> {
    let mut counts = Classification::new(labels);
    let references = predictions
        .iter()
        .map(|p| (format!("the record of {:?}", p.prompt), p.reference.clone()));
    for (truth, prediction) in truths(references, labels)?.into_iter().zip(predictions) {
        let taken = labels
            .iter()
            .position(|label| same(label, &prediction.prediction));
        counts.confusion[truth][taken.unwrap_or(labels.len())] += 1;
    }
    Ok(counts)
}

/// Every label as the answer to every question, ready to be scored.
#[derive(Debug)]
pub struct Candidates {
    labels: Vec<String>,
    /// The class of each question.
    truth: Vec<usize>,
    /// Question by question, label by label.
    samples: Vec<Sample>,
    pad: u32,
}

impl Candidates {
    /// `questions` with each of `labels` as the answer.
    ///
    /// # Errors
    /// Fewer than two labels, two that are the same to the tokenizer, an empty one; a reference that is no label.
    pub fn new(tokenizer: &Tokenizer, questions: &[Question], labels: &[String]) -> Result<Self> {
        let ids: Vec<Vec<u32>> = labels
            .iter()
            .map(|label| tokenizer.encode(label.trim()))
            .collect();
        let wrong = |found: String| {
            Err(Error::input(
                "--labels",
                found,
                "two or more different answers",
                "give them separated by commas",
            ))
        };
        if labels.len() < 2 {
            return wrong(format!("{} of them", labels.len()));
        }
        for (i, label) in labels.iter().enumerate() {
            if ids[i].is_empty() {
                return wrong("an empty one".to_string());
            }
            if let Some(j) = (0..i).find(|&j| ids[j] == ids[i]) {
                return wrong(format!(
                    "{:?} and {label:?}, the same to the tokenizer",
                    labels[j]
                ));
            }
        }
        // As the references are: decoded from ids.
        let labels: Vec<String> = ids.iter().map(|ids| tokenizer.decode(ids)).collect();
        let references = questions.iter().map(|q| (q.place.clone(), q.reference.clone()));
        let truth = truths(references, &labels)?;
        let special = tokenizer.special();
        let samples = questions
            .iter()
            .flat_map(|question| ids.iter().map(|label| candidate(question, label, special.eop)))
            .collect();
        Ok(Self {
            labels,
            truth,
            samples,
            pad: special.pad,
        })
    }

    /// The length of the longest candidate, for a workspace.
    pub fn longest(&self) -> usize {
        self.samples
            .iter()
            .map(|sample| sample.ids.len())
            .max()
            .unwrap_or_default()
    }

    /// The labels, as the tokenizer writes them.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// Takes each question for the label of the highest log-likelihood, the first of equals. `done` is called after every
    /// batch with the number of candidates scored so far, and how many there are.
    ///
    /// # Errors
    /// A batch is larger than the workspace, a likelihood is not finite.
    pub fn classify(
        &self,
        model: &Model,
        ws: &mut Workspace,
        batch_size: usize,
        done: &mut dyn FnMut(usize, usize),
    ) -> Result<Classification> {
        let likelihoods = self.likelihoods(model, ws, batch_size, done)?;
        let mut counts = Classification::new(&self.labels);
        for (&truth, of_labels) in self.truth.iter().zip(likelihoods.chunks(self.labels.len())) {
            let mut taken = 0;
            for (label, likelihood) in of_labels.iter().enumerate() {
                if *likelihood > of_labels[taken] {
                    taken = label;
                }
            }
            counts.confusion[truth][taken] += 1;
        }
        Ok(counts)
    }

    /// `ln P(label <eop> | prompt)` of every candidate: question by question, label by label.
    ///
    /// # Errors
    /// As [`Candidates::classify`].
    pub fn likelihoods(
        &self,
        model: &Model,
        ws: &mut Workspace,
        batch_size: usize,
        done: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<f64>> {
        let mut order: Vec<usize> = (0..self.samples.len()).collect();
        order.sort_by_key(|&i| self.samples[i].ids.len());
        let mut likelihoods = vec![0.0; self.samples.len()];
        let mut scored = 0;
        for batch in order.chunks(batch_size.max(1)) {
            let samples: Vec<&Sample> = batch.iter().map(|&i| &self.samples[i]).collect();
            let scores = model.token_scores(ws, &right_pad(&samples, self.pad, None))?;
            let mut scores = scores.into_iter();
            for (&i, sample) in batch.iter().zip(samples) {
                let tokens = sample.labels.iter().filter(|&&label| label != IGNORE).count();
                let sum: f64 = scores.by_ref().take(tokens).map(|score| score.log_prob).sum();
                if !sum.is_finite() {
                    return Err(not_finite(model, ws, sum));
                }
                likelihoods[i] = sum;
            }
            scored += batch.len();
            done(scored, self.samples.len());
        }
        Ok(likelihoods)
    }
}

/// `question` answered by `label`; the label and `<eop>` are supervised.
fn candidate(question: &Question, label: &[u32], eop: u32) -> Sample {
    let prompt = &question.ids;
    let ids: Vec<u32> = prompt.iter().chain(label).copied().chain([eop]).collect();
    let labels = ids
        .iter()
        .enumerate()
        .map(|(i, &id)| if i < prompt.len() { IGNORE } else { id as i32 })
        .collect();
    Sample {
        ids,
        labels,
        context: question.context,
        mask: question.mask,
        place: question.place.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(confusion: &[[usize; 3]; 2]) -> Classification {
        Classification {
            labels: vec!["是".to_string(), "否".to_string()],
            confusion: confusion.iter().map(|row| row.to_vec()).collect(),
        }
    }

    #[test]
    fn scores_are_their_definitions() {
        let counts = counts(&[[3, 1, 0], [2, 4, 2]]);
        assert_eq!(counts.records(), 12);
        assert_eq!(counts.accuracy(), 7.0 / 12.0);
        let [yes, no] = counts.classes()[..] else {
            unreachable!()
        };
        assert_eq!((yes.precision, yes.recall, yes.records), (0.6, 0.75, 4));
        assert_eq!((no.precision, no.recall, no.records), (0.8, 0.5, 8));
        assert!((yes.f1 - 2.0 * 0.6 * 0.75 / 1.35).abs() < 1e-15);
        assert!((counts.macro_f1() - (yes.f1 + no.f1) / 2.0).abs() < 1e-15);
    }

    #[test]
    fn a_class_that_never_occurs_scores_0() {
        let counts = counts(&[[5, 0, 0], [0, 0, 0]]);
        assert_eq!(counts.classes()[1].f1, 0.0);
        assert_eq!((counts.accuracy(), counts.macro_f1()), (1.0, 0.5));
        assert_eq!(Classification::new(&counts.labels).accuracy(), 0.0);
    }

    #[test]
    fn answers_that_are_no_label_have_a_column_of_their_own() {
        let labels = ["是".to_string(), "否".to_string()];
        let answer = |reference: &str, prediction: &str| {
            let question = Question {
                ids: Vec::new(),
                context: 0,
                mask: 0,
                prompt: "问".to_string(),
                reference: reference.to_string(),
                place: String::new(),
            };
            Prediction::new(&question, prediction.to_string(), true)
        };
        let all = [answer("是", "是 "), answer("是", "也许"), answer("否", "是")];
        let counts = of_answers(&all, &labels).unwrap();
        assert_eq!(counts.confusion, [[1, 0, 1], [1, 0, 0]]);
        let error = of_answers(&[answer("对", "是")], &labels)
            .unwrap_err()
            .to_string();
        assert!(error.contains("\"对\"") && error.contains("是, 否"), "{error}");
    }
}
