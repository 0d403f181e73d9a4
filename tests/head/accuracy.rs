//! What a head in few bits costs in accuracy, measured: `cargo test --test head accuracy -- --nocapture` prints the table of
//! docs/training.md.
//!
//! The built-in model on 200 records of the tasks it was trained on, none of which it has seen (`models/make/corpus.py base 200
//! 77`), and the golden checkpoints, whose weights are random, on the golden inputs. All in f32 on the CPU, so that nothing but
//! the form of the head differs.

use std::path::{Path, PathBuf};

use glmtune::checkpoint::Checkpoint;
use glmtune::data::batch::{Batch, IGNORE};
use glmtune::data::collate;
use glmtune::data::record::{Columns, read_records};
use glmtune::data::sample::{self, encode_all};
use glmtune::model::{EmbeddingPlace, HeadStorage, Model};
use glmtune::tensor::{Compute, DType};
use glmtune::tokenizer::Tokenizer;

use crate::common::{golden, values};
use crate::{SEPARATE, TIED, alone, batch, load};

/// What a form costs against the dense head.
#[derive(Debug)]
struct Cost {
    /// Mean loss in nats a token of the dense head, and how much more it is.
    loss: f64,
    more: f64,
    /// Mean Kullback-Leibler divergence of the distributions from those of the dense head, in nats.
    divergence: f64,
    /// The share of positions whose most probable token stays the same.
    agreement: f64,
}

/// Log-probabilities of every supervised position, one row after the other, and the labels.
fn log_probabilities(model: &Model, batches: &[Batch]) -> (Vec<f64>, Vec<usize>) {
    let vocabulary = model.config().vocab_size;
    let longest = batches.iter().map(|b| b.len).max().unwrap();
    let largest = batches.iter().map(|b| b.size).max().unwrap();
    let mut ws = model.workspace(largest, longest).unwrap();
    let (mut rows, mut labels) = (Vec::new(), Vec::new());
    for batch in batches {
        model.forward(&mut ws, batch, None).unwrap();
        let logits = values(&model.logits(&ws).unwrap());
        for b in 0..batch.size {
            for t in 0..batch.len - 1 {
                let label = batch.labels[b * batch.len + t + 1];
                if label == IGNORE {
                    continue;
                }
                let row = &logits[(b * batch.len + t) * vocabulary..][..vocabulary];
                let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total = row.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
                rows.extend(row.iter().map(|z| z - top - total));
                labels.push(label as usize);
            }
        }
    }
    (rows, labels)
}

fn cost(dir: &Path, head: HeadStorage, batches: &[Batch]) -> Cost {
    let run = |head| {
        let model = load(dir, Compute::cpu(DType::F32), head, EmbeddingPlace::Device);
        log_probabilities(&model, batches)
    };
    let ((dense, labels), (form, _)) = (run(HeadStorage::Compute), run(head));
    let (count, width) = (labels.len() as f64, dense.len() / labels.len());
    let loss = |rows: &[f64]| {
        let picked = rows.chunks(width).zip(&labels).map(|(row, &label)| -row[label]);
        picked.sum::<f64>() / count
    };
    let best = |row: &[f64]| (0..width).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    let pairs = || dense.chunks(width).zip(form.chunks(width));
    let divergence = |(p, q): (&[f64], &[f64])| {
        let terms = p.iter().zip(q).map(|(p, q)| p.exp() * (p - q));
        terms.sum::<f64>()
    };
    Cost {
        loss: loss(&dense),
        more: loss(&form) - loss(&dense),
        divergence: pairs().map(divergence).sum::<f64>() / count,
        agreement: pairs().filter(|(p, q)| best(p) == best(q)).count() as f64 / count,
    }
}

/// The built-in model's folder and 200 records of its tasks.
fn built_in() -> (PathBuf, Vec<Batch>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = root.join("models/tiny-glm");
    let tokenizer = Tokenizer::open(&dir.join("ice_text.model")).unwrap();
    let (records, _) = read_records(&root.join("tests/head/records.jsonl"), &Columns::default()).unwrap();
    let (samples, _) = encode_all(&tokenizer, &records, &sample::Options::default()).unwrap();
    let samples: Vec<_> = samples.iter().collect();
    let pad = tokenizer.special().pad;
    let batches = samples.chunks(20).map(|part| collate::right_pad(part, pad, None));
    (dir, batches.collect())
}

/// Bounds are about twice what was measured.
#[test]
fn accuracy_of_heads_in_few_bits() {
    let _alone = alone();
    let (dir, batches) = built_in();
    // (loss, divergence, agreement) at worst of 8 and of 4 bits. Random weights make flat distributions, whose first token
    // hangs on little.
    let trained = [(1e-4, 1e-5, 0.999), (2e-3, 2e-3, 0.998)];
    let random = [(3e-4, 4e-5, 0.97), (1e-2, 8e-3, 0.75)];
    let mut cases = vec![("built-in model", dir, batches, trained)];
    for (name, folder) in [("golden, tied", TIED), ("golden, separate", SEPARATE)] {
        let Some(dir) = golden(folder) else { continue };
        let vocabulary = Checkpoint::open(&dir).unwrap().config().vocab_size;
        let batches = (0..20).map(|number| batch(vocabulary, number)).collect();
        cases.push((name, dir, batches, random));
    }
    println!("| model | head | loss | more by | mean KL | same first token |");
    println!("|---|---|---:|---:|---:|---:|");
    for (name, dir, batches, bounds) in &cases {
        for (head, (more, divergence, agreement)) in
            [HeadStorage::Int8, HeadStorage::Nf4].into_iter().zip(*bounds)
        {
            let cost = cost(dir, head, batches);
            println!(
                "| {name} | {head:?} | {:.4} | {:+.5} | {:.6} | {:.2} % |",
                cost.loss,
                cost.more,
                cost.divergence,
                100.0 * cost.agreement
            );
            assert!(cost.more.abs() < more, "{name} {head:?}: {cost:?}");
            // Never negative, and 0 only for what is not quantised at all.
            assert!(
                0.0 < cost.divergence && cost.divergence < divergence,
                "{name} {head:?}: {cost:?}"
            );
            assert!(cost.agreement > agreement, "{name} {head:?}: {cost:?}");
        }
    }
}
