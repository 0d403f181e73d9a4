//! Does the program measure what it says it measures?

mod common;
#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::assert_close;
use glmtune::checkpoint::{Checkpoint, read_tensors, write_safetensors};
use glmtune::data::batch::{Batch, IGNORE};
use glmtune::data::collate::right_pad;
use glmtune::data::record::{Columns, read_records};
use glmtune::data::sample::{Options, Sample, encode_all};
use glmtune::evaluate::{
    AnswerOptions, Candidates, Forgetting, LossMetrics, ProbeOptions, Question, Reference, TextMetrics,
    answer, loss,
};
use glmtune::generate::GenerationConfig;
use glmtune::model::{LoadOptions, Model, Weights};
use glmtune::tensor::{Compute, DType, Tensor};
use glmtune::tokenizer::Tokenizer;
use program::{Workplace, fails, glmtune, str, succeeds, text};
use serde_json::Value;

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-glm")
}

fn load(compute: Compute) -> (Model, Tokenizer) {
    let options = LoadOptions {
        compute,
        weights: Weights::AsStored,
        ..LoadOptions::default()
    };
    let checkpoint = Checkpoint::open(&tiny()).unwrap();
    let model = Model::load(&checkpoint, &options).unwrap();
    (model, Tokenizer::open(&tiny()).unwrap())
}

/// Records with short answers, of several lengths and with one history.
fn samples(tokenizer: &Tokenizer) -> Vec<Sample> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    let lines = [
        r#"{"prompt": "今天的天气怎么样，适合出门吗？请用两个字回答。", "response": "适合"}"#,
        r#"{"prompt": "好吗", "response": "好"}"#,
        r#"{"prompt": "那呢", "response": "不好，完。", "history": [["一加一", "二"], ["二加二", "四"]]}"#,
        r#"{"prompt": "数到三", "response": "一二三，完"}"#,
        r#"{"prompt": "说点什么", "response": "好"}"#,
    ];
    std::fs::write(&path, lines.join("\n")).unwrap();
    let (records, _) = read_records(&path, &Columns::default()).unwrap();
    encode_all(tokenizer, &records, &Options::default()).unwrap().0
}

fn batches(samples: &[Sample], size: usize, pad: u32) -> Vec<Batch> {
    let all: Vec<&Sample> = samples.iter().collect();
    all.chunks(size)
        .map(|samples| right_pad(samples, pad, None))
        .collect()
}

#[test]
fn token_scores_are_those_of_the_logits() {
    for compute in common::exact_computes() {
        let (model, tokenizer) = load(compute);
        let samples = samples(&tokenizer);
        let batch = &batches(&samples, samples.len(), tokenizer.special().pad)[0];
        let mut ws = model.workspace(batch.size, batch.len).unwrap();
        let scores = model.token_scores(&mut ws, batch).unwrap();
        let logits = common::values(&model.logits(&ws).unwrap());
        let v = model.config().vocab_size;
        let (mut want, mut correct) = (Vec::new(), Vec::new());
        for (i, &label) in batch.labels.iter().enumerate() {
            if i % batch.len == 0 || label == IGNORE {
                continue;
            }
            let row = &logits[(i - 1) * v..i * v];
            let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|z| (z - top).exp()).sum();
            want.push(row[label as usize] - top - sum.ln());
            correct.push(row.iter().all(|&z| z <= row[label as usize]));
        }
        let got: Vec<f64> = scores.iter().map(|score| score.log_prob).collect();
        assert_close("ln p(label)", &got, &want, 1e-5, 1e-5);
        assert_eq!(scores.iter().map(|s| s.correct).collect::<Vec<_>>(), correct);
        // Neither always nor never.
        let hits = correct.iter().filter(|&&c| c).count();
        assert!(0 < hits && hits < correct.len(), "{hits} of {}", correct.len());

        let whole = model.loss(&mut ws, batch).unwrap();
        let told = loss(&model, &mut ws, [batch]).unwrap();
        assert_eq!(told.tokens, whole.tokens);
        assert_close("loss", &[told.loss], &[whole.mean()], 0.0, 1e-6);
        assert_eq!(told.token_accuracy, hits as f64 / correct.len() as f64);
        assert_close(
            "perplexity",
            &[told.perplexity()],
            &[whole.mean().exp()],
            0.0,
            1e-5,
        );
    }
}

#[test]
fn the_loss_weighs_tokens_and_not_batches() {
    let (model, tokenizer) = load(Compute::cpu(DType::F32));
    let samples = samples(&tokenizer);
    let measure = |size: usize| {
        let batches = batches(&samples, size, tokenizer.special().pad);
        let longest = batches.iter().map(|batch| batch.len).max().unwrap();
        let mut ws = model.workspace(size, longest).unwrap();
        loss(&model, &mut ws, batches).unwrap()
    };
    let LossMetrics {
        loss: together,
        token_accuracy,
        tokens,
    } = measure(samples.len());
    let alone = measure(1);
    assert_close("loss", &[alone.loss], &[together], 0.0, 1e-5);
    assert_eq!((alone.token_accuracy, alone.tokens), (token_accuracy, tokens));
}

#[test]
fn an_evaluation_never_hides_what_is_not_finite_or_not_there() {
    let (mut model, tokenizer) = load(Compute::cpu(DType::F32));
    let samples = samples(&tokenizer);
    let mut batch = batches(&samples, samples.len(), tokenizer.special().pad).remove(0);
    let mut ws = model.workspace(batch.size, batch.len).unwrap();
    let nothing = loss(&model, &mut ws, std::iter::empty::<Batch>())
        .unwrap_err()
        .to_string();
    assert!(nothing.contains("no supervised token"), "{nothing}");
    let reference = Reference::measure(&model, &tokenizer, &ProbeOptions { tokens: 2 }).unwrap();

    change(&mut model, "transformer.layers.2.input_layernorm.weight", |_| {
        f32::NAN
    });
    let error = loss(&model, &mut ws, [&batch]).unwrap_err().to_string();
    assert!(
        error.contains("transformer.layers.2") && error.contains("NaN"),
        "{error}"
    );
    let error = reference.compare(&model, &tokenizer).unwrap_err().to_string();
    assert!(error.contains("NaN") && error.contains("question 1"), "{error}");

    batch.labels.fill(IGNORE);
    assert!(loss(&model, &mut ws, [&batch]).is_err());
}

/// Changes every value of one parameter.
fn change(model: &mut Model, name: &str, f: impl Fn(f32) -> f32) {
    let mut found = false;
    model
        .for_each_param_mut(&mut |n, param| {
            if n == name {
                let values: Vec<f32> = param.value.to_f64_vec().iter().map(|&x| f(x as f32)).collect();
                let changed = Tensor::from_slice(&values, param.value.shape());
                param.value = changed.to_dtype(param.value.dtype());
                found = true;
            }
            Ok(())
        })
        .unwrap();
    assert!(found, "{name}");
}

#[test]
fn questions_and_references_are_what_the_sample_says() {
    let (_, tokenizer) = load(Compute::cpu(DType::F32));
    let samples = samples(&tokenizer);
    let questions: Vec<Question> = samples.iter().map(|s| Question::of(&tokenizer, s)).collect();
    let special = tokenizer.special();
    for (question, sample) in questions.iter().zip(&samples) {
        assert_eq!(
            question.ids[question.ids.len() - 2..],
            [special.gmask, special.sop]
        );
        assert!(sample.ids.starts_with(&question.ids));
    }
    assert_eq!(questions[1].prompt, "好吗");
    assert_eq!(questions[1].reference, "好");
    // Half-width, as the tokenizer writes it.
    assert_eq!(
        questions[3].reference,
        tokenizer.decode(&tokenizer.encode("一二三，完"))
    );
    assert!(
        questions[2].prompt.starts_with("[Round 0]\n"),
        "{}",
        questions[2].prompt
    );
}

#[test]
fn answers_do_not_depend_on_their_batch() {
    let (model, tokenizer) = load(Compute::cpu(DType::F32));
    let questions: Vec<Question> = samples(&tokenizer)
        .iter()
        .map(|s| Question::of(&tokenizer, s))
        .collect();
    for do_sample in [false, true] {
        let generation = GenerationConfig {
            do_sample,
            seed: 11,
            ..GenerationConfig::greedy(12)
        };
        let go = |batch_size| {
            let options = AnswerOptions {
                generation: generation.clone(),
                batch_size,
            };
            let mut seen = Vec::new();
            let all = answer(&model, &tokenizer, &questions, &options, &mut |done, _| {
                seen.push(done)
            })
            .unwrap();
            assert_eq!(seen.last(), Some(&questions.len()));
            all
        };
        let together = go(4);
        assert_eq!(together, go(1));
        for (prediction, question) in together.iter().zip(&questions) {
            assert_eq!(prediction.prompt, question.prompt);
            assert_eq!(prediction.reference, question.reference);
        }
        assert_eq!(TextMetrics::of(&together).unwrap().predictions, questions.len());
    }
}

#[test]
fn a_label_is_as_likely_as_the_answer_it_is() {
    let (model, tokenizer) = load(Compute::cpu(DType::F32));
    let samples: Vec<Sample> = samples(&tokenizer)
        .into_iter()
        .filter(|sample| Question::of(&tokenizer, sample).reference == "好")
        .collect();
    assert_eq!(samples.len(), 2);
    let questions: Vec<Question> = samples.iter().map(|s| Question::of(&tokenizer, s)).collect();
    let labels = ["好", "不太好", "很"].map(String::from);
    let candidates = Candidates::new(&tokenizer, &questions, &labels).unwrap();
    let mut ws = model.workspace(4, candidates.longest()).unwrap();
    let got = candidates
        .likelihoods(&model, &mut ws, 4, &mut |_, _| {})
        .unwrap();
    assert_eq!(got.len(), 6);
    // The first label is the records' own answer: its likelihood is their loss without the target <sop>.
    for (sample, got) in samples.iter().zip(got.chunks(3)) {
        let batch = right_pad(&[sample], tokenizer.special().pad, None);
        let scores = model.token_scores(&mut ws, &batch).unwrap();
        let want: f64 = scores[1..].iter().map(|score| score.log_prob).sum();
        assert_close("ln P", &[got[0]], &[want], 1e-4, 0.0);
    }
    // Accuracy counts the records whose first likelihood is the largest.
    let right = got.chunks(3).filter(|l| l[0] >= l[1] && l[0] >= l[2]).count();
    let counts = candidates.classify(&model, &mut ws, 3, &mut |_, _| {}).unwrap();
    assert_eq!(counts.accuracy(), right as f64 / 2.0);
    assert_eq!(counts.records(), 2);

    for (labels, what) in [
        (vec!["好"], "1 of them"),
        (vec!["好", "好 "], "the same to the tokenizer"),
        (vec!["好", " "], "an empty one"),
        (vec!["不太好", "很"], "\"好\""),
    ] {
        let labels: Vec<String> = labels.into_iter().map(String::from).collect();
        let error = Candidates::new(&tokenizer, &questions, &labels)
            .unwrap_err()
            .to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn an_unchanged_model_has_forgotten_nothing_and_a_changed_one_more_and_more() {
    let (mut model, tokenizer) = load(Compute::cpu(DType::F32));
    let reference = Reference::measure(&model, &tokenizer, &ProbeOptions { tokens: 4 }).unwrap();
    let same = reference.compare(&model, &tokenizer).unwrap();
    assert!(same.kl_mean < 1e-9, "{}", same.kl_mean);
    assert_eq!(same.top1_agreement, 1.0);
    assert_eq!(same.kl_per_probe.len(), 24);
    assert!(same.answers.iter().all(|(_, before, after)| before == after));

    let name = "transformer.layers.1.mlp.dense_4h_to_h.weight";
    let mut last = same.kl_mean;
    for factor in [1.2f32, 1.6, 4.0] {
        let (fresh, _) = load(Compute::cpu(DType::F32));
        model = fresh;
        change(&mut model, name, |x| factor * x);
        let Forgetting {
            kl_mean,
            kl_per_probe,
            ..
        } = reference.compare(&model, &tokenizer).unwrap();
        assert!(
            kl_mean > last && kl_per_probe.iter().all(|kl| *kl >= 0.0),
            "{factor}: {kl_mean} after {last}"
        );
        last = kl_mean;
    }
}

#[test]
fn a_reference_on_disk_is_the_one_in_memory() {
    let (mut model, tokenizer) = load(Compute::cpu(DType::F32));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("forgetting.safetensors");
    let reference = Reference::measure(&model, &tokenizer, &ProbeOptions { tokens: 3 }).unwrap();
    reference.save(&path).unwrap();
    change(&mut model, "transformer.final_layernorm.weight", |x| 1.1 * x);
    let read = Reference::read(&path, &model).unwrap();
    let want = reference.compare(&model, &tokenizer).unwrap();
    assert!(want.kl_mean > 0.0);
    assert_eq!(read.compare(&model, &tokenizer).unwrap(), want);

    // What is wrong in a file is named, with the file.
    let spoil = |change: &dyn Fn(&mut std::collections::BTreeMap<String, Tensor>)| {
        let mut tensors = read_tensors(&path).unwrap();
        change(&mut tensors);
        let other = dir.path().join("other.safetensors");
        let named: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        write_safetensors(&other, &named, &Default::default()).unwrap();
        Reference::read(&other, &model).unwrap_err().to_string()
    };
    let error = spoil(&|tensors| {
        tensors.remove("probe.03.tokens");
    });
    assert!(
        error.contains("other.safetensors: probe.03.tokens") && error.contains("measured again"),
        "{error}"
    );
    let error = spoil(&|tensors| {
        tensors.insert("suite.sha256".to_string(), Tensor::from_slice(&[7u8; 32], [32]));
    });
    assert!(error.contains("another suite"), "{error}");
    let error = spoil(&|tensors| {
        let shape = tensors["probe.00.log_probs"].shape();
        let values = vec![f32::NAN; shape.elements()];
        tensors.insert(
            "probe.00.log_probs".to_string(),
            Tensor::from_slice(&values, shape),
        );
    });
    assert!(error.contains("NaN"), "{error}");
    let error = spoil(&|tensors| {
        tensors.insert(
            "probe.00.tokens".to_string(),
            Tensor::from_slice(&[-1i32, 2, 3], [3]),
        );
    });
    assert!(error.contains("probe.00.tokens"), "{error}");
}

fn eval(place: &Workplace, extra: &[&str]) -> Command {
    let (model, data) = (place.model(), place.data());
    let mut args = vec!["eval", "--model", str(&model), "--data", str(&data)];
    args.extend(["--device", "cpu"]);
    if !extra.contains(&"--max-new-tokens") {
        args.extend(["--max-new-tokens", "8"]);
    }
    args.extend(extra);
    glmtune(&args)
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn eval_writes_metrics_and_predictions_with_the_official_names() {
    let Some(place) = Workplace::new() else { return };
    let out = place.path("out");
    let run = eval(&place, &["--output", str(&out), "--json"]).output().unwrap();
    succeeds(&run);
    let metrics: Value = serde_json::from_str(&text(&run.stdout)).unwrap();
    let written: Value = serde_json::from_slice(&std::fs::read(out.join("metrics.json")).unwrap()).unwrap();
    assert_eq!(metrics, written);
    let predictions = lines(&out.join("predictions.jsonl"));
    assert_eq!(metrics["samples"], 10);
    assert_eq!(predictions.len(), 10);
    for (i, line) in predictions.iter().enumerate() {
        // In the order of the records.
        assert_eq!(line["prompt"], format!("数到{i}"));
        assert!(line["prediction"].is_string() && line["ended"].is_boolean());
    }
    for name in ["rouge-1", "rouge-2", "rouge-l", "bleu-4"] {
        let mean: f64 = predictions.iter().map(|p| p[name].as_f64().unwrap()).sum::<f64>() / 10.0;
        assert_close(name, &[metrics[name].as_f64().unwrap()], &[mean], 1e-9, 0.0);
    }
    let loss = metrics["loss"].as_f64().unwrap();
    assert_close(
        "perplexity",
        &[metrics["perplexity"].as_f64().unwrap()],
        &[loss.exp()],
        0.0,
        1e-9,
    );
    for name in ["token_accuracy", "exact_match", "unended"] {
        assert!((0.0..=1.0).contains(&metrics[name].as_f64().unwrap()), "{name}");
    }
    assert!(metrics["empty"].is_u64());

    // Neither the batch size nor the number of threads shows.
    let again = place.path("again.jsonl");
    let run = eval(
        &place,
        &[
            "--predictions",
            str(&again),
            "--batch-size",
            "3",
            "--threads",
            "1",
        ],
    )
    .output()
    .unwrap();
    succeeds(&run);
    assert_eq!(lines(&again), predictions);
    let table = text(&run.stdout);
    assert!(
        table.contains("bleu-4") && table.contains("perplexity"),
        "{table}"
    );

    // Nothing is replaced without a word.
    let run = eval(&place, &["--output", str(&out)]).output().unwrap();
    assert!(fails(&run, 1).contains("--overwrite"));
    let run = eval(
        &place,
        &[
            "--output",
            str(&out),
            "--overwrite",
            "--max-samples",
            "2",
            "--no-generate",
        ],
    )
    .output()
    .unwrap();
    succeeds(&run);
    let metrics: Value = serde_json::from_slice(&std::fs::read(out.join("metrics.json")).unwrap()).unwrap();
    assert_eq!(metrics["samples"], 2);
    assert!(metrics.get("bleu-4").is_none() && metrics["loss"].is_f64());
}

#[test]
fn eval_counts_classes() {
    let Some(place) = Workplace::new() else { return };
    let records: Vec<Value> = (0..8)
        .map(
            |i| serde_json::json!({"q": format!("第{i}个好吗"), "a": if i % 2 == 0 { "好" } else { "不好" }}),
        )
        .collect();
    std::fs::write(place.data(), serde_json::to_string(&records).unwrap()).unwrap();
    let go = |labels: &str| {
        let run = eval(&place, &["--labels", labels, "--json"]).output().unwrap();
        succeeds(&run);
        serde_json::from_str::<Value>(&text(&run.stdout)).unwrap()
    };
    let metrics = go("auto");
    let counts = &metrics["classification"];
    let total: u64 = counts["confusion"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row.as_array().unwrap())
        .map(|n| n.as_u64().unwrap())
        .sum();
    assert_eq!(total, 8);
    assert_eq!(counts["classes"][0]["label"], "好");
    assert_eq!(counts["classes"][1]["records"], 4);
    assert_eq!(go("好,不好")["classification"], *counts);
    assert!(metrics["classification_of_answers"]["accuracy"].is_f64());
    let run = eval(&place, &["--labels", "好,坏"]).output().unwrap();
    let line = fails(&run, 1);
    assert!(
        line.contains("data.json:") && line.contains("不好") && line.contains("--labels"),
        "{line}"
    );
}

#[test]
fn eval_shows_what_an_adapter_made_the_model_forget() {
    let Some(place) = Workplace::new() else { return };
    succeeds(
        &place
            .train("run", &["--max-steps", "4", "--method", "lora"])
            .output()
            .unwrap(),
    );
    let adapter = place.path("run");
    let run = eval(
        &place,
        &[
            "--adapter",
            str(&adapter),
            "--forgetting",
            "--json",
            "--no-generate",
        ],
    )
    .output()
    .unwrap();
    succeeds(&run);
    let metrics: Value = serde_json::from_str(&text(&run.stdout)).unwrap();
    let forgetting = &metrics["forgetting"];
    assert!(forgetting["kl"].as_f64().unwrap() > 1e-4, "{forgetting}");
    assert_eq!(forgetting["probes"].as_array().unwrap().len(), 24);
    let run = eval(&place, &["--forgetting"]).output().unwrap();
    assert_eq!(run.status.code(), Some(2));
    assert!(text(&run.stderr).contains("--adapter"));
}

#[test]
fn bad_input_ends_in_one_line() {
    let Some(place) = Workplace::new() else { return };
    let cases: [(&[&str], i32, &str); 4] = [
        (&["--temperature", "0", "--sample"], 2, "--temperature"),
        (&["--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (&["--max-length", "2"], 2, "--max-length"),
        (
            &["--labels", "auto", "--predictions", "no/such/folder/p.jsonl"],
            1,
            "no/such/folder",
        ),
    ];
    for (extra, code, what) in cases {
        let line = fails(&eval(&place, extra).output().unwrap(), code);
        assert!(line.contains(what), "{line}");
    }
    std::fs::write(place.data(), r#"{"prompt": "好吗"}"#).unwrap();
    let line = fails(&eval(&place, &[]).output().unwrap(), 1);
    assert!(line.contains("data.json:1"), "{line}");
}
