//! Adapters alive on a model whose layers are loaded one after another.

use super::folder::{Pair, placed};
use super::merger::Merger;
use crate::error::Result;
use crate::model::glm::Block;
use crate::nn::{Dora, Lora};
use crate::tensor::{Compute, DType, Tensor};

impl Merger {
    /// Puts the adapters on the linears of block `layer`, frozen: `x Wᵀ + Σ_i f_i s_i (x A_iᵀ) B_iᵀ`, W as it is held.
    ///
    /// # Errors
    /// The device has no room.
    pub(in crate::model) fn put_on(&self, layer: usize, block: &mut Block, compute: Compute) -> Result<()> {
        let (dtype, device) = (compute.dtype.accumulator(), compute.device);
        for (module, linear) in block.linears_mut() {
            let name = format!("transformer.layers.{layer}.{module}.weight");
            let updates: Vec<(f64, &Pair)> = self.updates(&name).collect();
            let (scale, joined);
            let (a, b) = match updates.as_slice() {
                [] => continue,
                [(of_one, pair)] => {
                    scale = *of_one;
                    (&pair.a, &pair.b)
                }
                several => {
                    scale = 1.0;
                    joined = side_by_side(several);
                    (&joined.0, &joined.1)
                }
            };
            // One with a magnitude is alone.
            let magnitude = updates[0].1.magnitude.as_ref();
            let dora = magnitude.map(|m| Dora::new(linear.weight.as_ref(), placed(m, dtype, device, false)?));
            linear.lora = Some(Lora {
                a: placed(a, dtype, device, false)?,
                b: placed(b, dtype, device, false)?,
                scale,
                dropout: 0.0,
                dora: dora.transpose()?,
                found: None,
            });
        }
        Ok(())
    }
}

/// Adapters of one linear as one of the sum of their ranks, F32: the A below each other, and beside each other the B, each times
/// its f s.
fn side_by_side(updates: &[(f64, &Pair)]) -> (Tensor, Tensor) {
    let ranks: usize = updates.iter().map(|(_, pair)| pair.a.extent(0)).sum();
    let first = updates[0].1;
    let (input, out) = (first.a.extent(1), first.b.extent(0));
    let mut a = Vec::with_capacity(ranks * input);
    let mut b = vec![0f32; out * ranks];
    let mut column = 0;
    for (scale, pair) in updates {
        a.extend_from_slice(pair.a.to_dtype(DType::F32).as_slice::<f32>());
        let rank = pair.b.extent(1);
        let of_pair = pair.b.to_dtype(DType::F32);
        for (to, from) in b
            .chunks_exact_mut(ranks)
            .zip(of_pair.as_slice::<f32>().chunks_exact(rank))
        {
            for (to, &from) in to[column..column + rank].iter_mut().zip(from) {
                *to = (scale * f64::from(from)) as f32;
            }
        }
        column += rank;
    }
    (
        Tensor::from_slice(&a, [ranks, input]),
        Tensor::from_slice(&b, [out, ranks]),
    )
}
