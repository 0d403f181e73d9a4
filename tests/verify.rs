//! Is a result what it was made from? And does the comparison itself compute what it says, in the memory of one layer?

#[path = "common/mod.rs"]
mod common;
#[path = "common/program.rs"]
mod program;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use common::{assert_close, exact_computes, half_computes, values};
use glmtune::checkpoint::{LM_HEAD, Source, Stored, WORD_EMBEDDINGS};
use glmtune::data::batch::{Batch, IGNORE};
use glmtune::data::collate::right_pad;
use glmtune::data::sample::Sample;
use glmtune::error::Result;
use glmtune::export::merged::{Held, Into};
use glmtune::export::verify::{Bound, Comparison, Prompts, Rounding, Subject, compare};
use glmtune::model::sweep::sweep;
use glmtune::model::tune::{self, LoraConfig, Merger, SavedModule, Strength, Tuning};
use glmtune::model::{LoadOptions, Model, ModelConfig, Weights};
use glmtune::quant::QuantType;
use glmtune::rng::Stream;
use glmtune::tensor::ledger::{Ledger, Pool};
use glmtune::tensor::{Compute, DType, Device, Tensor};
use program::{Workplace, fails, glmtune, str, succeeds, text};

/// More classes than a panel has.
fn toy() -> ModelConfig {
    ModelConfig {
        vocab_size: 5000,
        hidden_size: 64,
        inner_hidden_size: 128,
        num_layers: 3,
        num_attention_heads: 4,
        max_sequence_length: 64,
        pad_token_id: 3,
        bos_token_id: 90,
        eos_token_id: 91,
        mask_token_id: 92,
        gmask_token_id: 93,
        ..ModelConfig::chatglm_6b()
    }
}

/// Weights in memory, to be spoilt; or made when they are asked for, and then held by nobody.
struct Weighing {
    config: ModelConfig,
    dtype: DType,
    separate_head: bool,
    changed: BTreeMap<String, Tensor>,
}

impl Weighing {
    fn new(config: ModelConfig, dtype: DType) -> Self {
        Self {
            config,
            dtype,
            separate_head: false,
            changed: BTreeMap::new(),
        }
    }

    fn tensor(&self, name: &str) -> Tensor {
        if let Some(tensor) = self.changed.get(name) {
            return tensor.clone();
        }
        let tensors = self.config.tensors();
        let number = tensors.iter().position(|(n, _)| n == name).unwrap();
        let shape = tensors[number].1;
        let stream = Stream::new(11, number as u64);
        let around = f32::from(u8::from(name.ends_with("layernorm.weight")));
        let size = if name.ends_with("embeddings.weight") {
            0.3
        } else {
            0.06
        };
        let values: Vec<f32> = (0..shape.elements() as u64)
            .map(|i| around + size * stream.normal(i))
            .collect();
        Tensor::from_slice(&values, shape).to_dtype(self.dtype)
    }

    /// With one number of one weight another.
    fn spoilt(mut self, name: &str, at: usize, change: impl Fn(f32) -> f32) -> Self {
        let mut tensor = self.tensor(name).to_dtype(DType::F32);
        let number = &mut tensor.as_mut_slice::<f32>()[at];
        *number = change(*number);
        self.changed.insert(name.to_string(), tensor.to_dtype(self.dtype));
        self
    }

    fn model(&self, compute: Compute, weights: Weights) -> Model {
        let options = LoadOptions {
            compute,
            weights,
            ..LoadOptions::default()
        };
        Model::load_from(self, &options).unwrap()
    }
}

impl Source for Weighing {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn separate_head(&self) -> Result<bool> {
        Ok(self.separate_head)
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        Ok(self.changed.get(name).map_or(self.dtype, Tensor::dtype))
    }

    fn weight(&self, name: &str) -> Result<Stored> {
        Ok(Stored::Dense(self.tensor(name)))
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        Ok(self.tensor(name).rows(rows))
    }

    fn place(&self, name: &str) -> String {
        format!("toy.safetensors: {name}")
    }
}

const NF4: Weights = Weights::Quantized {
    quant_type: QuantType::Nf4,
    double_quant: true,
};

/// The base in the form in which a training holds it.
fn held(source: &Weighing, weights: Weights) -> Held<'_> {
    let into = match weights {
        Weights::AsStored => Into::Original,
        Weights::Quantized {
            quant_type,
            double_quant,
        } => Into::Dequantized {
            quant_type,
            double_quant,
        },
    };
    Held::new(source, into, Vec::new()).unwrap()
}

/// Prompts of several lengths with answers, of which the first tokens count or do not.
fn samples(count: usize) -> Vec<Sample> {
    let sample = |i: usize| {
        let (context, len) = (3 + i % 4, 9 + 2 * (i % 5));
        let stream = Stream::new(2, i as u64);
        let mut ids: Vec<u32> = (0..len as u64)
            .map(|t| 100 + stream.below(t, 4900) as u32)
            .collect();
        (ids[context - 1], ids[context], ids[len - 1]) = (93, 90, 91);
        let first = context + i % 2;
        let labels = ids.iter().enumerate();
        Sample {
            labels: labels
                .map(|(t, &id)| if t < first { IGNORE } else { id as i32 })
                .collect(),
            context,
            mask: context - 1,
            place: format!("data.json:{}", i + 1),
            ids,
        }
    };
    (0..count).map(sample).collect()
}

fn prompts(count: usize) -> Prompts {
    Prompts {
        samples: samples(count),
        with_loss: true,
    }
}

fn batches() -> Vec<Batch> {
    let samples = samples(5);
    let parts = [&samples[..2], &samples[2..]];
    parts
        .map(|part| right_pad(&part.iter().collect::<Vec<_>>(), 3, None))
        .into()
}

fn lora(dora: bool, modules_to_save: &[SavedModule]) -> LoraConfig {
    LoraConfig {
        r: 3,
        alpha: 5.0,
        dora,
        modules_to_save: modules_to_save.to_vec(),
        ..LoraConfig::default()
    }
}

/// An adapter of the base `source`, in a folder of its own: everything that would train is moved at random.
fn adapter(source: &Weighing, config: LoraConfig, seed: u64, dir: &Path) -> PathBuf {
    let mut model = source.model(Compute::cpu(DType::F32), Weights::AsStored);
    let tuning = Tuning::Lora(config);
    tune::apply(&mut model, &tuning, seed).unwrap();
    let mut number = 0;
    model
        .for_each_param_mut(&mut |_, param| {
            number += 1;
            if param.trains() {
                let stream = Stream::new(seed, number);
                let moved = values(&param.value);
                let moved: Vec<f32> = (0..)
                    .zip(moved)
                    .map(|(i, x)| x as f32 + 0.05 * stream.normal(i))
                    .collect();
                param.value.write(&moved)?;
            }
            Ok(())
        })
        .unwrap();
    let dir = dir.join(format!("adapter-{seed}"));
    tune::save(&model, &tuning, Path::new("base"), &dir).unwrap();
    dir
}

fn merger(source: &Weighing, adapters: &[(&Path, f64)]) -> Merger {
    let strengths: Vec<Strength<'_>> = adapters
        .iter()
        .map(|&(dir, factor)| Strength { dir, factor })
        .collect();
    Merger::open(&source.config, &strengths).unwrap()
}

fn swept(subject: Subject<'_>, compute: Compute, batches: &[Batch]) -> Vec<Tensor> {
    sweep(subject, compute, batches, &mut |_| Ok(())).unwrap().hidden
}

/// The hidden states of a sweep are those of the model that lies whole in memory, to the bit.
#[track_caller]
fn assert_same_bits(what: &str, model: &Model, subject: Subject<'_>) {
    let batches = batches();
    let longest = batches.iter().map(|batch| batch.len).max().unwrap();
    let mut ws = model.workspace(3, longest).unwrap();
    let swept = swept(subject, model.compute(), &batches);
    for (batch, swept) in batches.iter().zip(&swept) {
        model.forward(&mut ws, batch, None).unwrap();
        let bits = |tensor: &Tensor| common::host(tensor).bytes().to_vec();
        assert!(bits(swept) == bits(ws.final_hidden()), "{what}");
    }
}

#[test]
fn a_sweep_makes_the_bits_of_the_whole_model() {
    for compute in exact_computes().into_iter().chain(half_computes()) {
        for dtype in [DType::F32, DType::F16] {
            let source = Weighing::new(toy(), dtype);
            for weights in [Weights::AsStored, NF4] {
                let what = format!("{compute:?} {dtype} {weights:?}");
                let held = held(&source, weights);
                let model = source.model(compute, weights);
                assert_same_bits(&what, &model, Subject::plain(&held));
            }
        }
    }
}

#[test]
fn adapters_are_alive_in_a_sweep_as_they_are_on_the_whole_model() {
    let dir = tempfile::tempdir().unwrap();
    let source = Weighing::new(toy(), DType::F16);
    let configs = [
        lora(false, &[]),
        lora(true, &[SavedModule::InputLayernorm, SavedModule::LmHead]),
        lora(false, &SavedModule::ALL),
    ];
    for (seed, config) in configs.into_iter().enumerate() {
        let folder = adapter(&source, config, seed as u64, dir.path());
        // An emulated device takes its time.
        let halves = if seed == 1 { half_computes() } else { Vec::new() };
        for compute in exact_computes().into_iter().chain(halves) {
            for (weights, factor) in [(Weights::AsStored, 1.0), (NF4, 0.7)] {
                let mut model = source.model(compute, weights);
                tune::load_adapter(&mut model, &folder, false).unwrap();
                tune::scale_adapter(&mut model, factor).unwrap();
                let merger = merger(&source, &[(&folder, factor)]);
                let held = held(&source, weights);
                let subject = Subject {
                    source: &held,
                    adapters: Some(&merger),
                };
                let what = format!("adapter {seed} {compute:?} {weights:?} {factor}");
                assert_same_bits(&what, &model, subject);
            }
        }
    }
}

#[test]
fn several_adapters_are_alive_with_their_weights() {
    let dir = tempfile::tempdir().unwrap();
    let source = Weighing::new(toy(), DType::F32);
    let first = adapter(
        &source,
        lora(false, &[SavedModule::FinalLayernorm]),
        1,
        dir.path(),
    );
    let second = adapter(
        &source,
        LoraConfig {
            r: 5,
            ..lora(false, &[])
        },
        2,
        dir.path(),
    );
    let merger = merger(&source, &[(&first, 0.75), (&second, -0.5)]);
    let subject = Subject {
        adapters: Some(&merger),
        ..Subject::plain(&source)
    };
    // The sum, written into the weights.
    let mut summed = Weighing::new(toy(), DType::F32);
    let names: Vec<String> = merger.changed().map(String::from).collect();
    for name in names {
        let merged = merger.merge(&name, source.tensor(&name)).unwrap();
        summed.changed.insert(name, merged);
    }
    let compute = Compute::cpu(DType::F32);
    let (alive, merged) = (
        swept(subject, compute, &batches()),
        swept(Subject::plain(&summed), compute, &batches()),
    );
    let base = swept(Subject::plain(&source), compute, &batches());
    for ((alive, merged), base) in alive.iter().zip(&merged).zip(&base) {
        let (alive, merged) = (values(alive), values(merged));
        assert_close("hidden states", &alive, &merged, 2e-5, 2e-5);
        let moved = alive.iter().zip(values(base)).map(|(x, y)| (x - y).abs());
        assert!(moved.fold(0.0, f64::max) > 0.1, "the adapters did nothing");
    }
}

/// What `compare` says of two models, from the logits of both that lie whole in memory, by the formulas.
fn by_hand(models: [&Model; 2], samples: &[Sample]) -> Comparison {
    let logits = |model: &Model, sample: &Sample| -> Vec<Vec<f64>> {
        let batch = right_pad(&[sample], 3, None);
        let mut ws = model.workspace(1, batch.len).unwrap();
        model.forward(&mut ws, &batch, None).unwrap();
        let logits = values(&model.logits(&ws).unwrap());
        logits
            .chunks_exact(model.config().vocab_size)
            .map(<[f64]>::to_vec)
            .collect()
    };
    let log_softmax = |row: &[f64]| -> Vec<f64> {
        let sum: f64 = row.iter().map(|x| x.exp()).sum();
        row.iter().map(|x| x - sum.ln()).collect()
    };
    let best = |row: &[f64]| (0..row.len()).reduce(|b, i| if row[i] > row[b] { i } else { b });
    let (mut max_diff, mut sum, mut variance, mut agreed, mut kl) = (0f64, 0.0, 0.0, 0usize, 0.0);
    let (mut positions, mut losses, mut labels) = (0, [0.0; 2], 0);
    let mut worst = String::new();
    for sample in samples {
        let both = models.map(|model| logits(model, sample));
        let rows = both[0].iter().zip(&both[1]).enumerate();
        for (t, (l, k)) in rows.skip(sample.context - 1) {
            positions += 1;
            for (x, y) in l.iter().zip(k) {
                if (x - y).abs() > max_diff {
                    max_diff = (x - y).abs();
                    worst = format!("{}, token {}", sample.place, t + 1);
                }
                sum += (x - y).abs();
            }
            let mean = l.iter().sum::<f64>() / l.len() as f64;
            variance += l.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / l.len() as f64;
            agreed += usize::from(best(l) == best(k));
            let (p, q) = (log_softmax(l), log_softmax(k));
            kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            if let Some(&label) = sample.labels.get(t + 1).filter(|&&label| label != IGNORE) {
                losses[0] -= p[label as usize];
                losses[1] -= q[label as usize];
                labels += 1;
            }
        }
    }
    let (n, vocabulary) = (positions as f64, models[0].config().vocab_size as f64);
    Comparison {
        prompts: samples.len(),
        positions,
        max_diff,
        worst,
        mean_diff: sum / (n * vocabulary),
        spread: (variance / n).sqrt(),
        top1: agreed as f64 / n,
        kl: kl / n,
        kept: None,
        loss: Some((losses[0] / f64::from(labels), losses[1] / f64::from(labels))),
    }
}

fn compared(reference: Subject<'_>, result: Subject<'_>, prompts: &Prompts, compute: Compute) -> Comparison {
    compare(&reference, &result, prompts, compute, &mut |done, _| {
        assert!((0.0..=1.0).contains(&done), "{done}");
        Ok(())
    })
    .unwrap()
}

#[test]
fn the_figures_are_those_of_two_models_that_lie_whole_in_memory() {
    let mut source = Weighing::new(toy(), DType::F16);
    source.separate_head = true;
    for compute in exact_computes() {
        // An emulated device takes its time.
        let on_host = compute.device == Device::Cpu;
        let prompts = prompts(if on_host { 40 } else { 6 });
        let models = [
            source.model(compute, Weights::AsStored),
            source.model(compute, NF4),
        ];
        let want = by_hand([&models[0], &models[1]], &prompts.samples);
        let held = held(&source, NF4);
        let got = compared(Subject::plain(&source), Subject::plain(&held), &prompts, compute);
        let figures = |c: &Comparison| {
            let (before, after) = c.loss.unwrap();
            [c.max_diff, c.mean_diff, c.spread, c.top1, c.kl, before, after]
        };
        assert_close("figures", &figures(&got), &figures(&want), 1e-6, 1e-4);
        assert_eq!(
            (got.prompts, got.positions, &got.worst),
            (want.prompts, want.positions, &want.worst)
        );
        assert!(got.max_diff > 0.001 && got.kl > 0.0, "{got:?}");
        assert!(!on_host || got.top1 < 1.0, "{got:?}");
    }
}

#[test]
fn a_result_with_the_weights_of_its_reference_is_at_no_distance() {
    let prompts = prompts(7);
    let source = Weighing::new(toy(), DType::F16);
    let again = Weighing::new(toy(), DType::F16);
    for compute in exact_computes() {
        let c = compared(Subject::plain(&source), Subject::plain(&again), &prompts, compute);
        assert_eq!((c.max_diff, c.mean_diff, c.kl, c.top1), (0.0, 0.0, 0.0, 1.0));
        let (before, after) = c.loss.unwrap();
        assert_eq!(before.to_bits(), after.to_bits());
    }
}

/// Exact kinds are tight: one weight of a few ten thousand is seen.
#[test]
fn one_flipped_weight_is_beyond_the_bound_of_exact_kinds() {
    let prompts = prompts(7);
    let compute = Compute::cpu(DType::F32);
    let source = Weighing::new(toy(), DType::F16);
    let spoilt = [
        ("transformer.layers.0.attention.query_key_value.weight", 777),
        ("transformer.layers.1.mlp.dense_h_to_4h.weight", 4321),
        ("transformer.layers.2.mlp.dense_4h_to_h.bias", 17),
        ("transformer.layers.2.input_layernorm.weight", 3),
    ];
    for (name, at) in spoilt {
        // A bit of the exponent, as disks and memories flip it.
        let wrong = Weighing::new(toy(), DType::F16).spoilt(name, at, |x| x * 256.0);
        let c = compared(Subject::plain(&source), Subject::plain(&wrong), &prompts, compute);
        let exact = Bound::of(c.spread, &[Rounding::F16]);
        assert!(
            !exact.admits(c.max_diff, c.mean_diff),
            "{name}: {c:?} within {exact:?}"
        );
    }
}

#[test]
fn rounding_to_the_types_of_exact_kinds_is_within_their_bounds() {
    let prompts = prompts(20);
    let compute = Compute::cpu(DType::F32);
    let source = Weighing::new(toy(), DType::F32);
    for (dtype, rounding) in [(DType::F16, Rounding::F16), (DType::BF16, Rounding::BF16)] {
        let mut rounded = Weighing::new(toy(), dtype);
        for (name, _) in source.config.tensors() {
            let tensor = source.tensor(&name).to_dtype(dtype);
            rounded.changed.insert(name, tensor);
        }
        let c = compared(
            Subject::plain(&source),
            Subject::plain(&rounded),
            &prompts,
            compute,
        );
        let allowed = Bound::of(c.spread, &[rounding]);
        assert!(
            c.max_diff > 0.0 && allowed.admits(c.max_diff, c.mean_diff),
            "{rounding}: {c:?}"
        );
    }
}

/// Four bits may move logits further than an adapter does: the bound alone lets a result pass that has lost it.
#[test]
fn an_adapter_that_is_not_in_the_result_is_seen_within_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = prompts(10);
    let compute = Compute::cpu(DType::F32);
    let source = Weighing::new(toy(), DType::F32);
    let folder = adapter(&source, lora(false, &[]), 3, dir.path());
    // The adapter written into the weights, so many times.
    let merged = |factor: f64| {
        let merger = merger(&source, &[(&folder, factor)]);
        let mut merged = Weighing::new(toy(), DType::F32);
        for name in merger.changed().map(String::from).collect::<Vec<_>>() {
            let weight = merger.merge(&name, source.tensor(&name)).unwrap();
            merged.changed.insert(name, weight);
        }
        merged
    };
    let with = |strength: f64, result: &Weighing| {
        let merger = merger(&source, &[(&folder, strength)]);
        let reference = Subject {
            adapters: Some(&merger),
            ..Subject::plain(&source)
        };
        let held = held(result, NF4);
        let c = compared(reference, Subject::plain(&held), &prompts, compute);
        let bound = Bound::of(c.spread, &[Rounding::Bits4]);
        assert!(bound.admits(c.max_diff, c.mean_diff), "{c:?}");
        c
    };
    let strength = 0.5;
    let right = with(strength, &merged(strength));
    let kept = right.kept.unwrap();
    assert!((kept.share.unwrap() - 1.0).abs() < 0.15, "{right:?}");
    assert!(!kept.is_lost(right.spread) && !kept.is_unclear(right.spread));
    let twice = merged(2.0 * strength);
    for (name, result, share) in [("lost", &source, 0.0), ("twice", &twice, 2.0)] {
        let c = with(strength, result);
        let kept = c.kept.unwrap();
        assert!(kept.is_lost(c.spread), "{name}: {c:?}");
        assert!((kept.share.unwrap() - share).abs() < 0.3, "{name}: {c:?}");
    }
    // Nothing of it: there is nothing to keep.
    let none = with(0.0, &source);
    let kept = none.kept.unwrap();
    assert!(kept.share.is_none() && !kept.is_lost(none.spread), "{none:?}");
    // Too little to tell from four bits.
    let little = with(1e-4, &source);
    let kept = little.kept.unwrap();
    assert!(!kept.is_lost(little.spread), "{little:?}");
    let plain = compared(
        Subject::plain(&source),
        Subject::plain(&source),
        &prompts,
        compute,
    );
    assert_eq!(plain.kept, None);
}

#[test]
fn the_rounding_is_that_of_the_coarsest_weights() {
    let mut source = Weighing::new(toy(), DType::F32);
    assert_eq!(Rounding::of_floats(&source).unwrap(), Rounding::F32);
    let name = "transformer.layers.1.mlp.dense_h_to_4h.weight";
    for (dtype, rounding) in [(DType::F16, Rounding::F16), (DType::BF16, Rounding::BF16)] {
        let tensor = source.tensor(name).to_dtype(dtype);
        source.changed.insert(name.to_string(), tensor);
        assert_eq!(Rounding::of_floats(&source).unwrap(), rounding);
    }
}

#[test]
fn a_number_that_is_none_is_an_error_with_its_place() {
    let prompts = prompts(3);
    let compute = Compute::cpu(DType::F32);
    let sound = Weighing::new(toy(), DType::F16);
    let nan = |name: &str, at: usize| Weighing::new(toy(), DType::F16).spoilt(name, at, |_| f32::NAN);
    let fails = |reference: &Weighing, result: &Weighing| {
        let (reference, result) = (Subject::plain(reference), Subject::plain(result));
        let told = compare(&reference, &result, &prompts, compute, &mut |_, _| Ok(()));
        told.unwrap_err().to_string()
    };
    let up = "transformer.layers.1.mlp.dense_h_to_4h.weight";
    for (reference, result) in [(&nan(up, 5), &sound), (&sound, &nan(up, 5))] {
        let line = fails(reference, result);
        assert!(line.starts_with(&format!("toy.safetensors: {up}: ")), "{line}");
    }
    // Small tensors are looked at as a whole.
    let line = fails(&sound, &nan("transformer.layers.2.mlp.dense_4h_to_h.bias", 0));
    assert!(line.contains("layers.2.mlp.dense_4h_to_h.bias"), "{line}");
    // A row of the head that no prompt reads.
    let line = fails(&sound, &nan(WORD_EMBEDDINGS, 4999 * 64));
    assert!(
        line.contains(WORD_EMBEDDINGS) && line.contains("NaN of class 4999 for data.json:"),
        "{line}"
    );
    let mut parted = nan(LM_HEAD, 64);
    parted.separate_head = true;
    let line = fails(&sound, &parted);
    assert!(line.contains(LM_HEAD) && line.contains("class 1 "), "{line}");
    // One that a prompt reads.
    let read = prompts.samples[0].ids[0] as usize;
    let line = fails(&nan(WORD_EMBEDDINGS, read * 64), &sound);
    assert!(line.contains(WORD_EMBEDDINGS), "{line}");
}

#[test]
fn models_of_different_vocabularies_are_not_compared() {
    let (small, large) = (
        Weighing::new(toy(), DType::F16),
        Weighing::new(
            ModelConfig {
                vocab_size: 5500,
                ..toy()
            },
            DType::F16,
        ),
    );
    let told = compare(
        &Subject::plain(&small),
        &Subject::plain(&large),
        &prompts(1),
        Compute::cpu(DType::F32),
        &mut |_, _| Ok(()),
    );
    let line = told.unwrap_err().to_string();
    assert!(line.contains("5500 tokens") && line.contains("5000"), "{line}");
}

/// The most bytes of tensors that a comparison of models of so many layers holds at once.
fn peak(num_layers: usize, compute: Compute) -> [u64; 2] {
    let config = ModelConfig { num_layers, ..toy() };
    let source = Weighing::new(config, DType::F16);
    let held = held(&source, NF4);
    let ledger = Ledger::new();
    ledger.scope(|| {
        compared(
            Subject::plain(&source),
            Subject::plain(&held),
            &prompts(5),
            compute,
        )
    });
    [Pool::Host, Pool::Device].map(|pool| ledger.peak(pool))
}

#[test]
fn four_times_the_layers_take_no_more_memory() {
    for compute in exact_computes() {
        let [few, many] = [3, 12].map(|layers| peak(layers, compute));
        assert_eq!(few, many);
        assert!(few.iter().sum::<u64>() > 0);
    }
}

/// Multiplies one float16 of a tensor of a safetensors file by 2^16 or divides it by that: one bit of its exponent.
fn flip(file: &Path, tensor: &str, at: usize) {
    let mut bytes = std::fs::read(file).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let info = metadata.info(tensor).unwrap();
    assert_eq!(info.dtype, safetensors::Dtype::F16);
    bytes[8 + header + info.data_offsets.0 + 2 * at + 1] ^= 0x40;
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn merged_and_verified_again_until_a_bit_flips() {
    let Some(place) = Workplace::new() else { return };
    succeeds(&place.train("run", &["--max-steps", "4"]).output().unwrap());
    let (model, run, data) = (place.model(), place.path("run"), place.data());
    let (output, base) = (
        place.path("merged"),
        ["--model", str(&model), "--adapter", str(&run)],
    );
    let merge = |more: &[&str]| {
        let args = [&["merge", "--output", str(&output)], &base[..], more].concat();
        glmtune(&args).output().unwrap()
    };
    // Weights in float16 are not to the bit those of the training.
    let line = fails(&merge(&["--verify-bound", "0"]), 1);
    assert!(
        line.contains("at most 0 (--verify-bound)") && line.contains("merged: found logits up to"),
        "{line}"
    );
    let left: Vec<_> = std::fs::read_dir(output.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("merged"))
        .collect();
    assert!(
        left.is_empty(),
        "nothing is left of a result that was refused: {left:?}"
    );

    let merged = merge(&["--verify-data", str(&data)]);
    succeeds(&merged);
    let table = text(&merged.stdout);
    for row in [
        "prompts  ",
        "largest logit difference  ",
        "same most probable token  ",
        "loss  ",
    ] {
        assert!(table.lines().any(|line| line.starts_with(row)), "{row}: {table}");
    }
    let verify = |more: &[&str]| {
        let args = [&["verify", str(&output)], &base[..], more].concat();
        glmtune(&args).output().unwrap()
    };
    succeeds(&verify(&[]));
    let name = "transformer.layers.1.mlp.dense_h_to_4h.weight";
    flip(&output.join("model.safetensors"), name, 1234);
    let line = fails(&verify(&[]), 1);
    assert!(
        line.contains("merged: found logits up to") && line.contains("of the spread: float16"),
        "{line}"
    );
    let line = fails(&verify(&["--verify-prompts", "17"]), 1);
    assert!(line.contains("at most the 16 built-in prompts"), "{line}");
    let line = fails(&verify(&["--verify-bound", "-1"]), 2);
    assert!(line.contains("--verify-bound"), "{line}");
}

/// The loss of the table is that of `glmtune eval`.
#[test]
fn the_loss_is_that_of_eval() {
    let Some(place) = Workplace::new() else { return };
    succeeds(
        &place
            .train("run", &["--max-steps", "4", "--method", "qlora"])
            .output()
            .unwrap(),
    );
    let (model, run, data) = (place.model(), place.path("run"), place.data());
    let base = ["--model", str(&model), "--adapter", str(&run), "--device", "cpu"];
    let output = place.path("merged");
    let args = [
        &["merge", "--output", str(&output), "--verify-data", str(&data)],
        &base[..],
    ]
    .concat();
    let merged = glmtune(&args).output().unwrap();
    succeeds(&merged);
    let table = text(&merged.stdout);
    let losses = table.lines().find_map(|line| line.strip_prefix("loss ")).unwrap();
    let mut losses = losses.split_whitespace();
    let (trained, result) = (losses.next().unwrap(), losses.nth(1).unwrap());
    let eval = |args: &[&str]| -> String {
        let args = [&["eval", "--data", str(&data), "--no-generate", "--json"], args].concat();
        let output = glmtune(&args).output().unwrap();
        succeeds(&output);
        let metrics: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        format!("{:.4}", metrics["loss"].as_f64().unwrap())
    };
    assert_eq!(trained, eval(&base), "{table}");
    assert_eq!(
        result,
        eval(&["--model", str(&output), "--device", "cpu"]),
        "{table}"
    );
}
