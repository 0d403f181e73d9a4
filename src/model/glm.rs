//! The ChatGLM-6B block: residuals start from the *normalised* input, scaled by alpha.

use super::policy::{DENSE, FC2, Part, Recompute};
use crate::data::batch::Span;
use crate::error::{Error, Result};
use crate::nn::{
    Attention, AttentionActivations, Fetched, Geometry, Keys, LayerNorm, Linear, Mlp, MlpActivations,
    NormActivations, Param, Scratch,
};
use crate::ops::{PrefixGradients, WeightRef};
use crate::rng::Stream;
use crate::tensor::ledger::planning;
use crate::tensor::{Compute, Tensor};

/// `sqrt(2 * 28)`: the official code builds its blocks without a layer count, so the default 28 stands whatever the
/// configuration says.
pub const ALPHA: f64 = 7.483_314_773_547_883;

/// One transformer block:
/// `a = input_layernorm(x); y = alpha a + attention(a); b = post_attention_layernorm(y); out = alpha b + mlp(b)`.
#[derive(Debug)]
pub struct Block {
    /// LN1.
    pub input_layernorm: LayerNorm,
    /// Self-attention.
    pub attention: Attention,
    /// LN2.
    pub post_attention_layernorm: LayerNorm,
    /// Feed-forward.
    pub mlp: Mlp,
}

/// What a block keeps for its backward pass.
#[derive(Debug)]
pub struct BlockActivations {
    /// a.
    pub input_layernorm: NormActivations,
    /// Inside the attention.
    pub attention: AttentionActivations,
    /// y `[rows, hidden]`.
    pub y: Tensor,
    /// b.
    pub post_attention_layernorm: NormActivations,
    /// Inside the feed-forward layer.
    pub mlp: MlpActivations,
}

/// Buffers of the backward pass, shared by all blocks.
#[derive(Debug)]
pub struct BackwardScratch {
    /// Over the inner values of the feed-forward layer. `None`: every layer makes q, k and v again after that has gone back,
    /// and lends their place.
    d_inner: Option<Tensor>,
    /// Over the output of a LayerNorm, then over the context.
    pub(super) d_norm: Tensor,
    d_y: Tensor,
}

impl BackwardScratch {
    /// For up to `rows` rows; `inner` for a gradient over the inner values that has a place of its own.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(compute: Compute, rows: usize, hidden: usize, inner: Option<usize>) -> Result<Self> {
        let d_inner = inner.map(|inner| compute.zeros([rows, inner]));
        Ok(Self {
            d_inner: d_inner.transpose()?,
            d_norm: compute.zeros([rows, hidden])?,
            d_y: compute.zeros([rows, hidden])?,
        })
    }
}

/// The dropout streams of one block: its four linears draw from neighbouring streams.
#[derive(Debug, Clone, Copy)]
pub struct BlockDropout(Option<Stream>);

impl BlockDropout {
    /// No dropout.
    pub const OFF: Self = Self(None);

    /// Of block `layer`, in the forward pass that `base` numbers.
    pub fn new(base: Stream, layer: usize) -> Self {
        Self(Some(Stream::new(
            base.seed(),
            (base.stream() << 16) | ((layer as u64) << 2),
        )))
    }

    fn linear(self, index: u64) -> Option<Stream> {
        self.0.map(|s| Stream::new(s.seed(), s.stream() + index))
    }

    fn attention(self) -> [Option<Stream>; 2] {
        [self.linear(0), self.linear(1)]
    }

    fn mlp(self) -> [Option<Stream>; 2] {
        [self.linear(2), self.linear(3)]
    }
}

/// The dropout stream of a prefix in the forward pass that `base` numbers: beyond those of the last possible block.
pub(crate) fn prefix_dropout(base: Stream) -> Stream {
    Stream::new(base.seed(), (base.stream() << 16) | 0xffff)
}

/// The stream of the noise on the embeddings in the forward pass that `base` numbers: beside that of the prefix.
pub(super) fn noise_stream(base: Stream) -> Stream {
    Stream::new(base.seed(), (base.stream() << 16) | 0xfffe)
}

impl Block {
    /// Activations for up to `rows` rows.
    ///
    /// # Errors
    /// The device has no room.
    pub fn activations(&self, compute: Compute, rows: usize) -> Result<BlockActivations> {
        let (_, hidden) = self.attention.query_key_value.extents();
        Ok(BlockActivations {
            input_layernorm: NormActivations::new(compute, rows, hidden)?,
            attention: self.attention.activations(compute, rows)?,
            y: compute.zeros([rows, hidden])?,
            post_attention_layernorm: NormActivations::new(compute, rows, hidden)?,
            mlp: self.mlp.activations(compute, rows)?,
        })
    }

    /// `out [rows, hidden]` from `x`. `fetched` are the four matrices when they were copied to where the block computes.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        fetched: Fetched<'_>,
        geometry: Geometry<'_>,
        keys: Keys<'_>,
        dropout: BlockDropout,
        activations: &mut BlockActivations,
        scratch: &mut Scratch,
        out: &mut Tensor,
    ) -> Result<()> {
        out.resize(x.shape())?;
        let of_attention = fetched.map(|[qkv, dense, ..]| [qkv, dense]);
        self.attend(x, of_attention, geometry, keys, dropout, activations, scratch)?;
        let BlockActivations {
            y,
            post_attention_layernorm: ln2,
            mlp,
            ..
        } = activations;
        self.post_attention_layernorm.forward(y, ln2)?;
        let fetched = fetched.map(|[.., up, down]| [up, down]);
        self.mlp
            .forward(&ln2.y, fetched, ALPHA, dropout.mlp(), mlp, scratch, out)
    }

    /// The first half of [`Block::forward`]: y.
    fn attend(
        &self,
        x: &Tensor,
        fetched: Option<[WeightRef<'_>; 2]>,
        geometry: Geometry<'_>,
        keys: Keys<'_>,
        dropout: BlockDropout,
        activations: &mut BlockActivations,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let BlockActivations {
            input_layernorm: ln1,
            attention,
            y,
            ..
        } = activations;
        y.resize(x.shape())?;
        self.input_layernorm.forward(x, ln1)?;
        self.attention.forward(
            &ln1.y,
            fetched,
            ALPHA,
            geometry,
            keys,
            dropout.attention(),
            attention,
            scratch,
            y,
        )
    }

    /// From `d`, the gradient over the output: adds the parameters' gradients and, when `propagate`, leaves the gradient
    /// over the input in `d`.
    ///
    /// `activations` hold what `recompute` keeps of the forward pass; the rest is made again here, half by half: the
    /// feed-forward layer has gone back before q, k and v are made.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn backward(
        &mut self,
        x: &Tensor,
        fetched: Fetched<'_>,
        geometry: Geometry<'_>,
        prefix: Option<PrefixGradients<'_>>,
        dropout: BlockDropout,
        recompute: Recompute,
        activations: &mut BlockActivations,
        (scratch, backward): (&mut Scratch, &mut BackwardScratch),
        d: &mut Tensor,
        propagate: bool,
    ) -> Result<()> {
        let drops = |part: Part| !part.is_kept(recompute, self);
        let (made_y, made_qkv, made_inner) = (drops(Part::Y), drops(Part::Qkv), drops(Part::Inner));
        let (made_u_dense, made_u_down) = (drops(Part::U(DENSE)), drops(Part::U(FC2)));
        let of_attention = fetched.map(|[qkv, dense, ..]| [qkv, dense]);
        let of_mlp = fetched.map(|[.., up, down]| [up, down]);
        if made_y {
            self.attend(
                x,
                of_attention,
                geometry,
                Keys::Own,
                dropout,
                activations,
                scratch,
            )?;
        }
        let BlockActivations {
            input_layernorm: ln1,
            attention,
            y,
            post_attention_layernorm: ln2,
            mlp,
        } = activations;
        let BackwardScratch { d_inner, d_norm, d_y } = backward;
        d_norm.resize(d.shape())?;
        d_y.resize(d.shape())?;
        self.post_attention_layernorm.forward(y, ln2)?;
        if made_inner {
            let up = of_mlp.map(|[up, _]| up);
            self.mlp.expand(&ln2.y, up, dropout.mlp()[0], mlp, scratch)?;
        }
        if self.mlp.dense_4h_to_h.reads_input() {
            self.mlp.activate(mlp)?;
        }
        if made_u_down {
            let down = of_mlp.map(|[_, down]| down);
            let MlpActivations { active, linear, .. } = &mut *mlp;
            self.mlp
                .dense_4h_to_h
                .recompute(active, down, dropout.mlp()[1], &mut linear[1], scratch)?;
        }
        self.mlp.backward(
            &ln2.y,
            of_mlp,
            d,
            ALPHA,
            dropout.mlp(),
            mlp,
            (&mut *scratch, d_inner.as_mut().unwrap_or(&mut attention.qkv)),
            d_norm,
        )?;
        self.post_attention_layernorm
            .backward(y, d_norm, &ln2.stats, Some(d_y))?;
        if !made_y {
            self.input_layernorm.forward(x, ln1)?;
            if made_qkv {
                let qkv = of_attention.map(|[qkv, _]| qkv);
                let dropout = dropout.attention()[0];
                self.attention
                    .project(&ln1.y, qkv, geometry, dropout, attention, scratch)?;
            }
            if made_u_dense {
                let dense = of_attention.map(|[_, dense]| dense);
                let AttentionActivations { context, linear, .. } = &mut *attention;
                self.attention.dense.recompute(
                    context,
                    dense,
                    dropout.attention()[1],
                    &mut linear[1],
                    scratch,
                )?;
            }
        }
        // `d` has been read: it now serves as the gradient over the context, then over LN1's output.
        let wanted = propagate || self.input_layernorm.trains();
        let (d_context, da) = (d_norm, d);
        let dx = if wanted { Some(&mut *da) } else { None };
        // So has the GELU's output, whose place takes the gradient over q, k and v.
        let buffers = (scratch, d_context, &mut mlp.active);
        self.attention.backward(
            &ln1.y,
            of_attention,
            d_y,
            ALPHA,
            geometry,
            prefix,
            dropout.attention(),
            attention,
            buffers,
            dx,
        )?;
        if wanted {
            let dx = if propagate { Some(&mut *d_y) } else { None };
            self.input_layernorm.backward(x, da, &ln1.stats, dx)?;
            std::mem::swap(da, d_y);
        }
        Ok(())
    }

    /// Does any parameter of the block train?
    pub fn trains(&self) -> bool {
        self.input_layernorm.trains()
            || self.post_attention_layernorm.trains()
            || self.linears().iter().any(|(_, linear)| linear.trains())
    }

    /// The four linears with their names within the block, in the order of the forward pass.
    pub fn linears(&self) -> [(&'static str, &Linear); 4] {
        [
            ("attention.query_key_value", &self.attention.query_key_value),
            ("attention.dense", &self.attention.dense),
            ("mlp.dense_h_to_4h", &self.mlp.dense_h_to_4h),
            ("mlp.dense_4h_to_h", &self.mlp.dense_4h_to_h),
        ]
    }

    /// [`Block::linears`], to change them.
    pub fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 4] {
        [
            ("attention.query_key_value", &mut self.attention.query_key_value),
            ("attention.dense", &mut self.attention.dense),
            ("mlp.dense_h_to_4h", &mut self.mlp.dense_h_to_4h),
            ("mlp.dense_4h_to_h", &mut self.mlp.dense_4h_to_h),
        ]
    }

    pub(crate) fn for_each_param<'a>(&'a self, name: &str, f: &mut dyn FnMut(&str, &'a Param)) {
        self.input_layernorm
            .for_each_param(&format!("{name}.input_layernorm"), f);
        self.attention
            .query_key_value
            .for_each_param(&format!("{name}.attention.query_key_value"), f);
        self.attention
            .dense
            .for_each_param(&format!("{name}.attention.dense"), f);
        self.post_attention_layernorm
            .for_each_param(&format!("{name}.post_attention_layernorm"), f);
        self.mlp
            .dense_h_to_4h
            .for_each_param(&format!("{name}.mlp.dense_h_to_4h"), f);
        self.mlp
            .dense_4h_to_h
            .for_each_param(&format!("{name}.mlp.dense_4h_to_h"), f);
    }

    pub(crate) fn for_each_param_mut<'a>(
        &'a mut self,
        name: &str,
        f: &mut dyn FnMut(&str, &'a mut Param) -> Result<()>,
    ) -> Result<()> {
        self.input_layernorm
            .for_each_param_mut(&format!("{name}.input_layernorm"), f)?;
        self.attention
            .query_key_value
            .for_each_param_mut(&format!("{name}.attention.query_key_value"), f)?;
        self.attention
            .dense
            .for_each_param_mut(&format!("{name}.attention.dense"), f)?;
        self.post_attention_layernorm
            .for_each_param_mut(&format!("{name}.post_attention_layernorm"), f)?;
        self.mlp
            .dense_h_to_4h
            .for_each_param_mut(&format!("{name}.mlp.dense_h_to_4h"), f)?;
        self.mlp
            .dense_4h_to_h
            .for_each_param_mut(&format!("{name}.mlp.dense_4h_to_h"), f)
    }
}

impl BlockActivations {
    /// The activations in the order they were computed, named after the module that made them.
    pub fn named(&self) -> [(&'static str, &Tensor); 7] {
        [
            ("input_layernorm", &self.input_layernorm.y),
            ("attention.query_key_value", &self.attention.qkv),
            ("attention.context", &self.attention.context),
            ("attention.dense", &self.y),
            ("post_attention_layernorm", &self.post_attention_layernorm.y),
            ("mlp.dense_h_to_4h", &self.mlp.inner),
            ("mlp.gelu", &self.mlp.active),
        ]
    }
}

/// Tables for [`crate::ops::rope`]: for each of `count` positions the cosines, then the sines, of
/// `position * inv_freq_i` with `inv_freq_i = fp16(10000^(-2i / r))`, `i < r / 2`, `r = head_dim / 2`.
///
/// Rounding the frequencies to fp16 is part of the official model in every precision; the angle is computed in f32.
///
/// # Errors
/// The device has no room.
pub fn rope_tables(compute: Compute, head_dim: usize, count: usize) -> Result<Tensor> {
    let r = head_dim / 2;
    if planning() {
        return compute.accumulators([count, r]);
    }
    let mut table = Vec::with_capacity(count * r);
    for position in 0..count {
        let angles = (0..r / 2).map(|i| {
            let exponent = (2 * i) as f32 / r as f32;
            let inv_freq = half::f16::from_f32(1.0 / 10_000f32.powf(exponent)).to_f32();
            f64::from(position as f32 * inv_freq)
        });
        let angles: Vec<f64> = angles.collect();
        table.extend(angles.iter().map(|a| a.cos() as f32));
        table.extend(angles.iter().map(|a| a.sin() as f32));
    }
    Tensor::from_slice(&table, [count, r])
        .to_dtype(compute.dtype.accumulator())
        .into_device(compute.device)
}

/// Checks that a batch's spans fit its length, once, before any layer sees them.
pub(crate) fn spans_fit(spans: &[Span], len: usize) -> bool {
    spans.iter().all(|s| s.start <= len && s.context <= len)
}

/// Checks the indices of a batch on the host, once, before they go to a device: there a wrong one could only make NaN.
pub(crate) fn check_indices(
    operation: &'static str,
    name: &str,
    indices: &[i32],
    bound: usize,
) -> Result<()> {
    match indices.iter().find(|&&i| i < 0 || i as usize >= bound) {
        None => Ok(()),
        Some(i) => Err(Error::Shape {
            operation,
            found: format!("{name} {i}"),
            expected: format!("{name} in 0..{bound}"),
        }),
    }
}

/// `(start, context)` of every span, as attention reads them.
pub(crate) fn span_indices(spans: &[Span]) -> Vec<i32> {
    let pairs = spans.iter().map(|s| [s.start as i32, s.context as i32]);
    pairs.flatten().collect()
}
