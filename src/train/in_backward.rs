//! Steps whose update is part of the backward pass: each layer is updated as soon as its gradients are complete, so that
//! gradients of one layer are held at a time (LOMO, Lv et al. 2023, arXiv 2306.09782; torchtune's `optimizer_in_bwd`).
//!
//! Gradients that are to be clipped need the norm of all gradients first, and those under a loss scale may have overflowed:
//! then the backward pass runs twice on the activations of one forward pass, at first for the sums of squares alone.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::model::{ByLayer, Layer, LayerGradients, Model, Workspace};
use crate::ops;
use crate::optim::Optimizer;
use crate::rng::Stream;

/// What steps in the backward pass need beside the model and the optimizer.
pub(super) struct InBackward {
    gradients: LayerGradients,
    /// The number in model order of every parameter that trains, for each layer in the order of [`Model::layers`].
    order: Vec<Vec<usize>>,
    /// The step that was broken off when some layers had taken it.
    broken: Option<u64>,
}

/// The backward pass to run.
pub(super) struct Pass<'a> {
    pub step: u64,
    /// `d(loss)/d(nll_sum)`, times the loss scale.
    pub scale: f64,
    pub dropout: Stream,
    /// `Σ g²` of every parameter that trains, in model order, to be filled in.
    pub squares: Option<&'a mut [f64]>,
    /// What to update with; after it has been seen that `squares` are finite, if these are asked for.
    pub update: Option<Update<'a>>,
}

/// See [`Optimizer::update`].
pub(super) struct Update<'a> {
    pub optimizer: &'a mut Optimizer,
    pub rate: f64,
    pub clip: f64,
}

impl InBackward {
    /// Makes room for the gradients of one layer, in place of those that the model has.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(model: &mut Model) -> Result<Self> {
        let gradients = LayerGradients::new(model)?;
        let mut numbers = BTreeMap::new();
        model.for_each_param(&mut |name, param| {
            if param.trains() {
                numbers.insert(name.to_string(), numbers.len());
            }
        });
        let mut order = Vec::new();
        for layer in model.layers() {
            let mut of_layer = Vec::new();
            model.for_each_param_of_mut(layer, &mut |name, _| {
                of_layer.extend(numbers.get(name));
                Ok(())
            })?;
            order.push(of_layer);
        }
        Ok(Self {
            gradients,
            order,
            broken: None,
        })
    }

    /// Bytes of the gradients that layers share.
    pub fn bytes(&self) -> usize {
        self.gradients.bytes()
    }

    /// Can a step of so many micro-batches be taken?
    ///
    /// # Errors
    /// It is more than one, or a step was broken off.
    pub fn check(&self, micro_batches: usize) -> Result<()> {
        self.check_whole()?;
        if micro_batches == 1 {
            return Ok(());
        }
        Err(Error::input(
            "--gradient-accumulation-steps",
            micro_batches,
            "1, since the update in the backward pass keeps no gradients to add to",
            "raise --micro-batch-size instead",
        ))
    }

    /// # Errors
    /// A step was broken off: some layers have taken it and others have not.
    pub fn check_whole(&self) -> Result<()> {
        match self.broken {
            None => Ok(()),
            Some(step) => Err(Error::input(
                format!("step {step}"),
                "a model of which some layers have taken the step and others have not",
                "a whole step",
                "go on from the last checkpoint with --resume",
            )),
        }
    }

    /// Runs a backward pass after [`Model::loss_to_learn`].
    ///
    /// # Errors
    /// [`Error::NonFinite`] of a gradient while nothing was updated yet; after a part of an update, every error says that the
    /// model is of no use any more.
    pub fn run(&mut self, model: &mut Model, workspace: &mut Workspace, pass: Pass<'_>) -> Result<()> {
        self.gradients.begin(model)?;
        let (step, scale, dropout) = (pass.step, pass.scale, pass.dropout);
        let mut running = Running {
            gradients: &mut self.gradients,
            order: &self.order,
            pass,
            touched: false,
        };
        let result = model.gradients_by_layer(workspace, scale, dropout, &mut running);
        let result = match running.pass.update {
            Some(update) if result.is_ok() => update.optimizer.end(),
            _ => result,
        };
        if result.is_err() && running.touched {
            self.broken = Some(step);
        }
        result.map_err(|error| match self.broken {
            Some(step) => half_updated(step, error),
            None => error,
        })
    }
}

/// An error that came when some layers had taken the step.
fn half_updated(step: u64, error: Error) -> Error {
    const GO_ON: &str = "some layers were updated already, so this model is not saved: go on from the last checkpoint with --resume";
    match error {
        Error::NonFinite { value, layer, .. } => Error::input(
            format!("step {step}: {layer}"),
            value,
            "numbers",
            format!("{GO_ON}; --max-grad-norm above 0 looks at all gradients before it updates"),
        ),
        other => Error::input(format!("step {step}"), other, "an update of every layer", GO_ON),
    }
}

struct Running<'a, 'p> {
    gradients: &'a mut LayerGradients,
    order: &'a [Vec<usize>],
    pass: Pass<'p>,
    /// Has a layer been updated?
    touched: bool,
}

impl ByLayer for Running<'_, '_> {
    fn begin(&mut self, model: &mut Model, layer: Layer) -> Result<()> {
        self.gradients.lend(model, layer)
    }

    fn end(&mut self, model: &mut Model, layer: Layer) -> Result<()> {
        if let Some(squares) = &mut self.pass.squares {
            let (mut names, mut gradients) = (Vec::new(), Vec::new());
            model.for_each_param_of_mut(layer, &mut |name, param| {
                if let Some(gradient) = &param.grad {
                    names.push(name.to_string());
                    gradients.push(gradient);
                }
                Ok(())
            })?;
            let of_layer = ops::sums_of_squares(&gradients)?;
            for (&number, &square) in self.order[layer.place(model)].iter().zip(&of_layer) {
                squares[number] = square;
            }
            let bad = of_layer.iter().position(|square| !square.is_finite());
            if let (Some(bad), Some(_)) = (bad, &self.pass.update) {
                return Err(Error::NonFinite {
                    step: self.pass.step,
                    what: "the gradient norm",
                    value: of_layer[bad].sqrt(),
                    layer: format!("the gradient of {}", names[bad]),
                    remedy: "that step was left out".into(),
                });
            }
        }
        if let Some(Update {
            optimizer,
            rate,
            clip,
        }) = &mut self.pass.update
        {
            self.touched |= !self.order[layer.place(model)].is_empty();
            optimizer.update(*rate, *clip, |visit| model.for_each_param_of_mut(layer, visit))?;
        }
        self.gradients.take_back(model, layer)
    }
}
