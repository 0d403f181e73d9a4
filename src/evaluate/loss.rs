//! Loss, perplexity and token accuracy of a model that is told the answers.

use std::borrow::Borrow;

use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::model::{Model, Workspace};

/// What a model makes of the answers of a data set when it is told them token by token (teacher forcing).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossMetrics {
    /// Mean `-ln p(label)` over all supervised tokens, in nats.
    pub loss: f64,
    /// The share of supervised tokens that no other token exceeds, from 0 to 1.
    pub token_accuracy: f64,
    /// The number of supervised tokens.
    pub tokens: usize,
}

impl LossMetrics {
    /// `exp(loss)`; infinite where f64 ends, at a loss of 709.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// Loss and token accuracy over `batches`, every supervised token weighing the same, without dropout.
///
/// # Errors
/// A batch is larger than the workspace; a loss is not finite (the first layer that is not is named); nothing is supervised.
pub fn loss<B: Borrow<Batch>>(
    model: &Model,
    ws: &mut Workspace,
    batches: impl IntoIterator<Item = B>,
) -> Result<LossMetrics> {
    let (mut nll, mut correct, mut tokens) = (0.0, 0usize, 0usize);
    for batch in batches {
        for score in model.token_scores(ws, batch.borrow())? {
            if !score.log_prob.is_finite() {
                return Err(not_finite(model, ws, -score.log_prob));
            }
            nll -= score.log_prob;
            correct += usize::from(score.correct);
            tokens += 1;
        }
    }
    if tokens == 0 {
        return Err(Error::input(
            "evaluation data",
            "no supervised token",
            "at least one",
            "give records with an answer",
        ));
    }
    Ok(LossMetrics {
        loss: nll / tokens as f64,
        token_accuracy: correct as f64 / tokens as f64,
        tokens,
    })
}

/// Says that a token's loss is no number, and where that began.
pub(super) fn not_finite(model: &Model, ws: &mut Workspace, value: f64) -> Error {
    Error::input(
        model
            .first_non_finite(ws)
            .unwrap_or_else(|| "evaluation loss".to_string()),
        value,
        "a finite number",
        "check the model and adapter files with `glmtune inspect`, or compute with --dtype fp32",
    )
}
