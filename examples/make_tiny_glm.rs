//! Makes the weights of `models/tiny-glm`: full-parameter training from random numbers, on the CPU.
//!
//! ```text
//! python3 models/make/corpus.py base 200000 1 > base.jsonl
//! cargo run --release --example make_tiny_glm -- base.jsonl models/tiny-glm OUT 4000
//! ```
//!
//! The second argument is the folder of `config.json` and `ice_text.model`, the third receives a complete model, the
//! fourth is the number of steps. The same arguments give the same weights, up to the rounding of the machine's vector
//! width.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use glmtune::checkpoint::write_safetensors;
use glmtune::config::LossReduction;
use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::error::{Error, Result};
use glmtune::model::tune::{self, Tuning};
use glmtune::model::{LoadOptions, Model, ModelConfig};
use glmtune::optim::OptimizerConfig;
use glmtune::rng::Stream;
use glmtune::schedule::{Schedule, Scheduler};
use glmtune::tensor::{DType, Tensor};
use glmtune::tokenizer::Tokenizer;
use glmtune::train::{Options, Trainer};

/// Padded tokens of one step.
const BATCH_TOKENS: usize = 512;
const SEED: u64 = 1;

/// Token ids of prompt, `[gMASK]`, `<sop>`, answer, `<eop>`, and the index of `<sop>`.
struct Sample {
    ids: Vec<u32>,
    context: usize,
}

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [corpus, source, out, steps] = arguments.as_slice() else {
        return Err(usage(format!("{} arguments", arguments.len())));
    };
    let steps: u64 = steps.parse().map_err(|_| usage(format!("steps {steps:?}")))?;
    let (source, out) = (Path::new(source), Path::new(out));

    let config = ModelConfig::read(source)?;
    let tokenizer = Tokenizer::open(source)?;
    std::fs::create_dir_all(out).map_err(Error::io(out, "create"))?;
    for name in ["config.json", "ice_text.model"] {
        if source != out {
            std::fs::copy(source.join(name), out.join(name)).map_err(Error::io(out.join(name), "copy"))?;
        }
    }

    let samples = read_samples(Path::new(corpus), &tokenizer)?;
    let longest = samples.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    let mut model = Model::initialize(&config, SEED, &LoadOptions::default())?;
    tune::apply(&mut model, &Tuning::Full, SEED)?;
    widen(&mut model)?;
    let options = Options {
        optimizer: OptimizerConfig {
            beta2: 0.98,
            weight_decay: 0.01,
            ..OptimizerConfig::default()
        },
        schedule: Schedule {
            scheduler: Scheduler::Cosine,
            base: 3e-3,
            warmup_steps: 100,
            total_steps: steps,
            ..Schedule::default()
        },
        max_grad_norm: 1.0,
        in_backward: false,
        reduction: LossReduction::Token,
        seed: SEED,
    };
    // The shortest sequence decides how many fit a batch.
    let shortest = samples.iter().map(|s| s.ids.len()).min().unwrap_or(1);
    let mut trainer = Trainer::new(model, options, BATCH_TOKENS / shortest, longest)?;

    let start = Instant::now();
    let (mut tokens, mut loss) = (0, 0.0);
    let mut epoch = 0;
    while trainer.steps() < steps {
        let batches = batches(&samples, epoch);
        for batch in batches.iter().take((steps - trainer.steps()) as usize) {
            let rows: Vec<&Sample> = batch.iter().map(|&i| &samples[i]).collect();
            let batch = right_padded(&rows, config.pad_token_id);
            tokens += batch.size * batch.len;
            let report = trainer.step(std::slice::from_ref(&batch))?;
            loss += report.loss;
            if report.step % 100 == 0 {
                let rate = tokens as f64 / start.elapsed().as_secs_f64();
                println!(
                    "step {} tokens {tokens} loss {:.4} {rate:.0} tok/s",
                    report.step,
                    loss / 100.0
                );
                loss = 0.0;
            }
        }
        epoch += 1;
    }

    let mut tensors = Vec::new();
    trainer.model().for_each_param(&mut |name, param| {
        tensors.push((name.to_string(), param.value.to_dtype(DType::F16)));
    });
    let tensors: Vec<(String, &Tensor)> = tensors.iter().map(|(name, t)| (name.clone(), t)).collect();
    write_safetensors(&out.join("model.safetensors"), &tensors, &BTreeMap::new())
}

fn usage(found: String) -> Error {
    Error::input(
        "make_tiny_glm",
        found,
        "BASE.jsonl MODEL_DIR OUT_DIR STEPS",
        "see the head of this example",
    )
}

/// Unit variance through every linear. Those that close a sub-layer start four times larger: the residual's factor
/// is made for 28 layers and would drown them in four.
fn widen(model: &mut Model) -> Result<()> {
    /// The deviation of [`Model::initialize`].
    const INITIAL: f32 = 0.02;
    model.for_each_param_mut(&mut |name, param| {
        if param.value.shape().extents().len() == 2 && !name.ends_with("word_embeddings.weight") {
            let closes = name.ends_with(".dense.weight") || name.ends_with("dense_4h_to_h.weight");
            let gain = if closes { 4.0 } else { 1.0 };
            let factor = gain / (param.value.extent(1) as f32).sqrt() / INITIAL;
            param
                .value
                .as_mut_slice::<f32>()
                .iter_mut()
                .for_each(|x| *x *= factor);
        }
        Ok(())
    })
}

fn read_samples(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Sample>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
    let special = tokenizer.special();
    let mut samples = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let record: BTreeMap<String, String> = serde_json::from_str(line).map_err(|error| {
            let place = format!("{}:{}", path.display(), number + 1);
            Error::input(
                place,
                error,
                "instruction, input and output",
                "make the corpus again",
            )
        })?;
        // Joined as `glmtune train` joins them.
        let parts = [&*record["instruction"], &*record["input"]];
        let query = parts
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("\n");
        let mut ids = tokenizer.encode(&query);
        let context = ids.len() + 1;
        ids.extend([special.gmask, special.sop]);
        ids.extend(tokenizer.encode(&record["output"]));
        ids.push(special.eop);
        samples.push(Sample { ids, context });
    }
    Ok(samples)
}

/// Batches of similar lengths, in random order: indices of samples.
fn batches(samples: &[Sample], epoch: u64) -> Vec<Vec<usize>> {
    let mut order = Stream::new(SEED, 1 << 32 | epoch).permutation(samples.len());
    order.sort_by_key(|&i| samples[i].ids.len());
    let mut batches = vec![Vec::new()];
    for i in order {
        let last = batches
            .last_mut()
            .filter(|b| (b.len() + 1) * samples[i].ids.len() <= BATCH_TOKENS);
        match last {
            Some(batch) => batch.push(i),
            None => batches.push(vec![i]),
        }
    }
    batches.retain(|batch| !batch.is_empty());
    let shuffled = Stream::new(SEED, 1 << 33 | epoch).permutation(batches.len());
    shuffled
        .into_iter()
        .map(|i| std::mem::take(&mut batches[i]))
        .collect()
}

/// `<sop>`, the answer and `<eop>` are supervised, as in the official script.
fn right_padded(rows: &[&Sample], pad: u32) -> Batch {
    let len = rows.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    let (mut ids, mut labels, mut positions, mut spans) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        for i in 0..len {
            let id = row.ids.get(i).map(|&id| id as i32);
            ids.push(id.unwrap_or(pad as i32));
            labels.push(id.filter(|_| i >= row.context).unwrap_or(IGNORE));
            let position = if i < row.context { i } else { row.context - 1 };
            positions.extend([position as i32, (i + 1).saturating_sub(row.context) as i32]);
        }
        spans.push(Span {
            start: 0,
            context: row.context,
        });
    }
    Batch {
        size: rows.len(),
        len,
        ids,
        labels,
        positions,
        spans,
    }
}
