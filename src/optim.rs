//! AdamW as in PyTorch, and clipping by the global gradient norm.

use std::collections::BTreeMap;
use std::path::Path;

use crate::checkpoint::{read_tensors, refuse_non_finite, write_safetensors};
use crate::error::{Error, Result};
use crate::nn::Param;
use crate::ops::{self, AdamW as Factors, AdamwSlot};
use crate::tensor::{DType, Device, Tensor};

/// The numbers of AdamW that stay the same over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator after bias correction.
    pub epsilon: f64,
    /// Decoupled weight decay, in units of the learning rate.
    pub weight_decay: f64,
    /// As the Hugging Face Trainer: biases and LayerNorm parameters are not decayed ([`is_decayed`]).
    pub exclude_bias_and_norm: bool,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            exclude_bias_and_norm: true,
        }
    }
}

/// Does the Hugging Face Trainer decay this parameter? Everything but biases and the parameters of LayerNorms;
/// LoRA's A and B are decayed.
pub fn is_decayed(name: &str) -> bool {
    !(name.ends_with(".bias") || name.ends_with("layernorm.weight"))
}

/// The factor of the gradients that brings a global norm above `max` down to it: `min(1, max / (norm + 1e-6))`,
/// as `torch.nn.utils.clip_grad_norm_`.
pub fn clip_factor(norm: f64, max: f64) -> f64 {
    (max / (norm + 1e-6)).min(1.0)
}

/// The two moments of one parameter.
#[derive(Debug)]
struct Moments {
    name: String,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

/// AdamW (Loshchilov & Hutter) over every parameter with a gradient, state in f32:
///
/// `p *= 1 - lr wd; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
/// p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    step: u64,
    moments: Vec<Moments>,
}

impl AdamW {
    /// An optimizer without parameters.
    pub fn new(config: AdamWConfig) -> Self {
        Self {
            config,
            step: 0,
            moments: Vec::new(),
        }
    }

    /// Makes room for the moments of a parameter; one without a gradient is passed over.
    ///
    /// # Errors
    /// The parameter's device has no room.
    pub fn register(&mut self, name: &str, param: &Param) -> Result<()> {
        if param.grad.is_some() {
            let (device, shape) = (param.value.device(), param.value.shape());
            self.moments.push(Moments {
                name: name.to_string(),
                exp_avg: Tensor::zeros_on(device, DType::F32, shape)?,
                exp_avg_sq: Tensor::zeros_on(device, DType::F32, shape)?,
            });
        }
        Ok(())
    }

    /// The number of parameters that train.
    pub fn len(&self) -> usize {
        self.moments.len()
    }

    /// Does nothing train?
    pub fn is_empty(&self) -> bool {
        self.moments.is_empty()
    }

    /// The number of steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Takes one step: `rate` is its learning rate, `clip` the factor of every gradient ([`clip_factor`]).
    ///
    /// `visit` calls the function that it is given with every parameter, in the order of [`AdamW::register`]; those
    /// without a gradient are passed over:
    ///
    /// ```text
    /// optimizer.step(rate, clip, |visit| model.for_each_param_mut(visit))?;
    /// ```
    ///
    /// # Errors
    /// The parameters are not those registered, or in another order; nothing is updated then.
    pub fn step<'a>(
        &'a mut self,
        rate: f64,
        clip: f64,
        visit: impl FnOnce(&mut dyn FnMut(&str, &'a mut Param) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let c = &self.config;
        let t = (self.step + 1) as f64;
        let factors = Factors {
            clip: clip as f32,
            decay: (1.0 - rate * c.weight_decay) as f32,
            one_minus_beta1: (1.0 - c.beta1) as f32,
            beta2: c.beta2 as f32,
            one_minus_beta2: (1.0 - c.beta2) as f32,
            step_size: (rate / (1.0 - c.beta1.powf(t))) as f32,
            sqrt_correction2: (1.0 - c.beta2.powf(t)).sqrt() as f32,
            epsilon: c.epsilon as f32,
        };
        let unexpected = |found: &str| Error::Shape {
            operation: "AdamW::step",
            found: found.to_string(),
            expected: "the parameters in the order they were registered in".to_string(),
        };
        let mut moments = self.moments.iter_mut();
        let mut slots = Vec::new();
        visit(&mut |name, param| {
            let Some(g) = &param.grad else { return Ok(()) };
            let m = moments.next().filter(|m| m.name == name);
            let m = m.ok_or_else(|| unexpected(name))?;
            slots.push(AdamwSlot {
                p: &mut param.value,
                g,
                m: &mut m.exp_avg,
                v: &mut m.exp_avg_sq,
                decayed: is_decayed(name) || !c.exclude_bias_and_norm,
            });
            Ok(())
        })?;
        if let Some(m) = moments.next() {
            return Err(unexpected(&format!("the end before {}", m.name)));
        }
        ops::adamw_all(&mut slots, &factors)?;
        self.step += 1;
        Ok(())
    }

    /// Writes the state, bit for bit, under PyTorch's names: `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, `step`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut tensors = vec![("step".to_string(), Tensor::from_slice(&[self.step as i64], [1]))];
        for m in &self.moments {
            for (part, tensor) in [("exp_avg", &m.exp_avg), ("exp_avg_sq", &m.exp_avg_sq)] {
                tensors.push((format!("{part}.{}", m.name), tensor.to_device(Device::Cpu)?));
            }
        }
        let tensors: Vec<(String, &Tensor)> = tensors.iter().map(|(name, t)| (name.clone(), t)).collect();
        write_safetensors(path, &tensors, &BTreeMap::new())
    }

    /// Reads a state that [`AdamW::save`] wrote for the same parameters.
    ///
    /// # Errors
    /// The file cannot be read, or holds other parameters than those registered.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        const REMEDY: &str = "resume with the model and the flags that the run was started with";
        let mut tensors = read_tensors(path)?;
        let mut take = |name: &str, like: Option<&Tensor>| -> Result<Tensor> {
            let place = format!("{}: {name}", path.display());
            let found = tensors
                .remove(name)
                .ok_or_else(|| Error::input(&place, "nothing", "a tensor", REMEDY))?;
            let (dtype, shape) = like.map_or((DType::I64, [1].into()), |t| (t.dtype(), t.shape()));
            if (found.dtype(), found.shape()) != (dtype, shape) {
                let is = format!("{} {}", found.dtype(), found.shape());
                return Err(Error::input(place, is, format!("{dtype} {shape}"), REMEDY));
            }
            Ok(found)
        };
        let step = take("step", None)?.as_slice::<i64>()[0];
        for m in &mut self.moments {
            // Copied: what was read may be mapped, the moments are written.
            let exp_avg = take(&format!("exp_avg.{}", m.name), Some(&m.exp_avg))?;
            let exp_avg_sq = take(&format!("exp_avg_sq.{}", m.name), Some(&m.exp_avg_sq))?;
            for (part, tensor) in [("exp_avg", &exp_avg), ("exp_avg_sq", &exp_avg_sq)] {
                refuse_non_finite(&format!("{}: {part}.{}", path.display(), m.name), tensor)?;
            }
            m.exp_avg.copy_from(&exp_avg)?;
            m.exp_avg_sq.copy_from(&exp_avg_sq)?;
        }
        if let Some(name) = tensors.keys().next() {
            return Err(Error::input(
                path.display(),
                format!("state of {name}, which does not train now"),
                format!("the state of {} parameters", self.moments.len()),
                REMEDY,
            ));
        }
        self.step = u64::try_from(step)
            .map_err(|_| Error::input(format!("{}: step", path.display()), step, "a step from 0", REMEDY))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(value: &[f32], grad: &[f32]) -> Param {
        let shape = [value.len()];
        Param {
            value: Tensor::from_slice(value, shape),
            grad: Some(Tensor::from_slice(grad, shape)),
        }
    }

    /// The reference: the same formula in f64, written from the paper.
    fn reference(config: AdamWConfig, start: f64, target: f64, rate: f64, steps: i32) -> f64 {
        let (mut p, mut m, mut v) = (start, 0.0, 0.0);
        for t in 1..=steps {
            let g = p - target;
            p *= 1.0 - rate * config.weight_decay;
            m = config.beta1 * m + (1.0 - config.beta1) * g;
            v = config.beta2 * v + (1.0 - config.beta2) * g * g;
            let (mh, vh): (f64, f64) = (m / (1.0 - config.beta1.powi(t)), v / (1.0 - config.beta2.powi(t)));
            p -= rate * mh / (vh.sqrt() + config.epsilon);
        }
        p
    }

    #[test]
    fn adamw_walks_the_path_of_the_formula() {
        let config = AdamWConfig {
            weight_decay: 0.1,
            ..AdamWConfig::default()
        };
        let mut p = param(&[3.0, -1.0], &[0.0, 0.0]);
        let mut optimizer = AdamW::new(config);
        optimizer.register("w", &p).unwrap();
        for _ in 0..200 {
            let gradient: Vec<f32> = p.value.as_slice::<f32>().iter().map(|p| p - 1.0).collect();
            p.grad
                .as_mut()
                .unwrap()
                .as_mut_slice::<f32>()
                .copy_from_slice(&gradient);
            optimizer.step(0.05, 1.0, |visit| visit("w", &mut p)).unwrap();
        }
        for (got, start) in p.value.to_f64_vec().into_iter().zip([3.0, -1.0]) {
            let want = reference(config, start, 1.0, 0.05, 200);
            assert!((got - want).abs() < 2e-5, "{got} {want}");
        }
    }

    #[test]
    fn large_parameters_update_as_small_ones_and_their_norm_does_not_depend_on_the_threads() {
        let n = 100_003;
        let stream = crate::rng::Stream::new(3, 0);
        let values: Vec<f32> = (0..n).map(|i| stream.normal(i)).collect();
        let gradients: Vec<f32> = (0..n).map(|i| stream.normal(i + n)).collect();
        let mut whole = param(&values, &gradients);
        let mut optimizer = AdamW::new(AdamWConfig::default());
        optimizer.register("w", &whole).unwrap();
        optimizer.step(0.01, 0.5, |visit| visit("w", &mut whole)).unwrap();
        for i in [0usize, 32_767, 32_768, 100_002] {
            let mut one = param(&values[i..=i], &gradients[i..=i]);
            let mut optimizer = AdamW::new(AdamWConfig::default());
            optimizer.register("w", &one).unwrap();
            optimizer.step(0.01, 0.5, |visit| visit("w", &mut one)).unwrap();
            assert_eq!(
                one.value.as_slice::<f32>()[0],
                whole.value.as_slice::<f32>()[i],
                "element {i}"
            );
        }
        let norm = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let gradients = [whole.grad.as_ref().unwrap()];
            pool.install(|| ops::sum_of_squares_all(&gradients).unwrap().sqrt())
        };
        let exact = gradients
            .iter()
            .map(|&g| f64::from(g).powi(2))
            .sum::<f64>()
            .sqrt();
        assert!((norm(1) - exact).abs() < 1e-9 * exact);
        assert_eq!(norm(1).to_bits(), norm(3).to_bits());
    }

    #[test]
    fn biases_and_layer_norms_are_not_decayed_but_lora_is() {
        assert!(!is_decayed("transformer.layers.0.input_layernorm.weight"));
        assert!(!is_decayed("transformer.layers.0.post_attention_layernorm.bias"));
        assert!(!is_decayed("transformer.final_layernorm.weight"));
        assert!(!is_decayed("transformer.layers.0.attention.query_key_value.bias"));
        assert!(is_decayed(
            "transformer.layers.0.attention.query_key_value.weight"
        ));
        assert!(is_decayed(
            "base_model.model.transformer.layers.0.mlp.dense_h_to_4h.lora_A.weight"
        ));
        let mut optimizer = AdamW::new(AdamWConfig {
            weight_decay: 0.5,
            ..AdamWConfig::default()
        });
        let (mut weight, mut bias) = (param(&[1.0], &[0.0]), param(&[1.0], &[0.0]));
        optimizer.register("a.weight", &weight).unwrap();
        optimizer.register("a.bias", &bias).unwrap();
        optimizer
            .step(0.5, 1.0, |visit| {
                visit("a.weight", &mut weight)?;
                visit("a.bias", &mut bias)
            })
            .unwrap();
        assert_eq!(weight.value.as_slice::<f32>(), [0.75]);
        assert_eq!(bias.value.as_slice::<f32>(), [1.0]);
    }

    #[test]
    fn clipping_is_that_of_torch() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert_eq!(clip_factor(2.0, 1.0), 1.0 / (2.0 + 1e-6));
    }

    #[test]
    fn parameters_in_another_order_are_an_error() {
        let (mut a, mut b) = (param(&[1.0], &[1.0]), param(&[1.0], &[1.0]));
        let mut optimizer = AdamW::new(AdamWConfig::default());
        optimizer.register("a", &a).unwrap();
        optimizer.register("b", &b).unwrap();
        let wrong = optimizer.step(0.1, 1.0, |visit| {
            visit("a", &mut a)?;
            visit("a", &mut b)
        });
        assert!(wrong.is_err());
        assert!(optimizer.step(0.1, 1.0, |visit| visit("a", &mut a)).is_err());
        assert_eq!(optimizer.steps(), 0);
        assert_eq!(a.value.as_slice::<f32>(), [1.0], "nothing is updated");
    }
}
