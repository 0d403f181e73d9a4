//! Greedy continuations, batches with left padding, and the distributions that sampling draws from.

use std::ops::ControlFlow;
use std::path::Path;

use glmtune::data::batch::{Batch, IGNORE};
use glmtune::data::{collate, template};
use glmtune::generate::sampling::Sampler;
use glmtune::generate::stream::TextStream;
use glmtune::generate::{Ends, GenerationConfig, generate, run};
use glmtune::model::{LoadOptions, Model, tune};
use glmtune::tensor::{Compute, Tensor};
use glmtune::tokenizer::{Special, Tokenizer};
use serde_json::{Map, Value};

use crate::common::{assert_close, exact_computes, golden, prefix_folder, read_safetensors, tolerance};
use crate::forward::load;

const FOLDER: &str = "chatglm_v1/generation";

/// The sampling settings of a golden case over transformers' own defaults (top-k 50).
fn config(settings: &Map<String, Value>) -> GenerationConfig {
    let mut config = GenerationConfig {
        temperature: 1.0,
        top_p: 1.0,
        ..GenerationConfig::default()
    };
    for (name, value) in settings {
        let number = value
            .as_f64()
            .unwrap_or_else(|| panic!("setting {name}: {value} is not a number"));
        match name.as_str() {
            "temperature" => config.temperature = number,
            "top_k" => config.top_k = number as usize,
            "top_p" => config.top_p = number,
            "repetition_penalty" => config.repetition_penalty = number,
            "no_repeat_ngram_size" => config.no_repeat_ngram_size = number as usize,
            other => panic!("a golden case uses the setting {other}, which glmtune does not have"),
        }
    }
    config
}

#[test]
fn sampling_probabilities_are_those_of_transformers() {
    let (Some(json), Some(file)) = (
        golden(&format!("{FOLDER}/sampling_probs.json")),
        golden(&format!("{FOLDER}/sampling_probs.safetensors")),
    ) else {
        return;
    };
    let atol = tolerance(&format!("{FOLDER}/sampling_probs.safetensors"))["atol"]
        .as_f64()
        .expect("an atol");
    let cases: Map<String, Value> = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    let tensors = read_safetensors(&file);
    let logits = &tensors["logits"];
    let (rows, vocab) = logits.shape().rows_and_columns();
    let length = tensors["input_ids"].extent(1);
    assert!(!cases.is_empty() && rows > 0);
    for (case, description) in &cases {
        let config = config(description["settings"].as_object().expect("settings"));
        assert_eq!(
            Some(config.top_k as u64),
            description["effective_top_k"].as_u64(),
            "case {case}: top-k"
        );
        let mut sampler = Sampler::new(&config).unwrap();
        let want = tensors[&format!("probs.{case}")].to_f64_vec();
        for row in 0..rows {
            let name = format!("case {case} {} row {row}", description["settings"]);
            let history: Vec<u32> = tensors["input_ids"].as_slice::<i64>()[row * length..][..length]
                .iter()
                .map(|&id| id as u32)
                .collect();
            let logits = &logits.as_slice::<f32>()[row * vocab..][..vocab];
            let mut got: Vec<f64> = sampler
                .probabilities(logits, &history)
                .iter()
                .map(|&p| f64::from(p))
                .collect();
            let mut want = want[row * vocab..][..vocab].to_vec();
            let kept = got.iter().filter(|&&p| p > 0.0).count();
            if config.top_p < 1.0 && ties(logits) {
                // Which of equal tokens top-p cuts is up to the order of torch.sort: compare the probabilities alone.
                got.sort_by(f64::total_cmp);
                want.sort_by(f64::total_cmp);
            } else {
                let sets = |p: &[f64]| p.iter().map(|&p| p > 0.0).collect::<Vec<_>>();
                assert_eq!(sets(&got), sets(&want), "{name}: kept tokens");
            }
            assert_eq!(
                Some(kept as u64),
                description["kept"][row].as_u64(),
                "{name}: number of kept tokens"
            );
            assert_close(&name, &got, &want, atol, 0.0);
        }
    }
}

/// Does a row hold one value many times over, more often than chance makes f32 logits collide?
fn ties(logits: &[f32]) -> bool {
    let mut sorted = logits.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted.chunk_by(|a, b| a == b).any(|equal| equal.len() > 2)
}

/// The base model; the first that the set has. Both hold the same values.
const BASE: [&str; 2] = [
    "chatglm_v1/checkpoint_fp32_safetensors",
    "chatglm_v1/checkpoint_fp16_bin",
];

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .expect("a list")
        .iter()
        .map(|x| x.as_u64().expect("an id") as u32)
        .collect()
}

fn lists(value: &Value) -> Vec<Vec<u32>> {
    value
        .as_array()
        .expect("a list of lists")
        .iter()
        .map(numbers)
        .collect()
}

/// The special ids of a model; `<unk>`, which a configuration does not have, is not used here.
fn special(model: &Model) -> Special {
    let config = model.config();
    Special {
        unk: 0,
        sop: config.bos_token_id,
        eop: config.eos_token_id,
        pad: config.pad_token_id,
        mask: config.mask_token_id,
        gmask: config.gmask_token_id,
    }
}

/// Everything of a greedy run: the new tokens of each row and the logits of every step, `[B, V]` each.
fn greedy(model: &Model, batch: &Batch, new_tokens: usize, eos: u32) -> (Vec<Vec<u32>>, Vec<Tensor>) {
    let mut cache = model.cache(batch.size, batch.len + new_tokens).unwrap();
    let first = model.prefill(&mut cache, batch).unwrap();
    let mut logits = vec![first.clone()];
    let order: Vec<u64> = (0..batch.size as u64).collect();
    let ends = Ends {
        eos,
        pad: model.config().pad_token_id,
    };
    let config = GenerationConfig::greedy(new_tokens);
    let sequences = run(
        batch,
        &order,
        &config,
        ends,
        first,
        &mut |_, _| ControlFlow::Continue(()),
        |tokens| {
            let next = model.decode(&mut cache, tokens)?;
            logits.push(next.clone());
            Ok(next)
        },
    )
    .unwrap();
    (sequences, logits)
}

/// The model of a golden case, or `None` with a loud line when the set lacks it.
fn model_of(name: &str, compute: Compute) -> Option<Model> {
    let options = LoadOptions {
        compute,
        ..LoadOptions::default()
    };
    let mut model = BASE.iter().find_map(|folder| load(folder, &options))?;
    if name == "base" {
        return Some(model);
    }
    if name == "full_finetuned" {
        let tensors = read_safetensors(&golden(
            "chatglm_v1/trajectories/full/final_trainable.safetensors",
        )?);
        let mut used = 0;
        model
            .for_each_param_mut(&mut |name, param| {
                let tensor = tensors
                    .get(name)
                    .unwrap_or_else(|| panic!("final_trainable lacks {name}"));
                assert_eq!(tensor.shape(), param.value.shape(), "{name}");
                param.value = tensor.to_device(compute.device)?;
                used += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(
            used,
            tensors.len(),
            "tensors of final_trainable that the model does not have"
        );
        return Some(model);
    }
    if name == "ptuning" {
        let weights = golden("chatglm_v1/trajectories/ptuning_embed/final_prefix_encoder.safetensors")?;
        tune::load_adapter(&mut model, prefix_folder(&weights).path(), false).unwrap();
        return Some(model);
    }
    let adapter = golden(&format!("chatglm_v1/trajectories/{name}/final_adapter"))?;
    tune::load_adapter(&mut model, &adapter, false).unwrap();
    Some(model)
}

#[test]
fn greedy_continuations_and_their_logits_are_the_official_ones() {
    exact_computes().into_iter().for_each(greedy_continuations);
}

fn greedy_continuations(compute: Compute) {
    let Some(json) = golden(&format!("{FOLDER}/greedy.json")) else {
        return;
    };
    let stored = golden(&format!("{FOLDER}/greedy_logits.safetensors")).map(|path| read_safetensors(&path));
    let set = read_json(&json);
    let eos = set["eos_token_id"].as_u64().unwrap() as u32;
    let new_tokens = set["max_new_tokens"].as_u64().unwrap() as usize;
    let mut current: (String, Option<Model>, usize) = Default::default();
    let mut compared = 0;
    for case in set["cases"].as_array().unwrap() {
        let name = case["model"].as_str().unwrap();
        if current.0 != name {
            current = (name.to_string(), model_of(name, compute), 0);
        }
        let (_, model, index) = &mut current;
        let label = format!("{name}.{index}");
        *index += 1;
        let Some(model) = model else { continue };
        let batch = collate::left_pad(&[numbers(&case["prompt_ids"])], &special(model));
        let (got, logits) = greedy(model, &batch, new_tokens, eos);
        let want = numbers(&case["new_ids"]);
        assert_eq!(got[0], want, "{label}: new ids");
        assert_eq!(
            got[0].last() == Some(&eos),
            case["stopped_by_eos"].as_bool().unwrap(),
            "{label}"
        );
        let config = GenerationConfig::greedy(new_tokens);
        let whole = generate(
            model,
            &batch,
            &[0],
            &config,
            &mut |_, _| ControlFlow::Continue(()),
        )
        .unwrap();
        assert_eq!(whole.sequences[0], want, "{label}: through generate()");
        compared += 1;

        let Some(stored) = &stored else { continue };
        let atol = tolerance(&format!("{FOLDER}/greedy_logits.safetensors"))["atol"]
            .as_f64()
            .expect("an atol");
        assert_eq!(logits.len(), want.len(), "{label}: steps");
        if let (Some(ids), Some(values)) = (
            stored.get(&format!("{label}.top16_ids")),
            stored.get(&format!("{label}.top16_logits")),
        ) {
            let width = ids.extent(1);
            assert_eq!(ids.extent(0), logits.len(), "{label}: steps");
            for (step, row) in logits.iter().enumerate() {
                let ids = &ids.as_slice::<i64>()[step * width..][..width];
                let got: Vec<f64> = ids
                    .iter()
                    .map(|&id| f64::from(row.as_slice::<f32>()[id as usize]))
                    .collect();
                let want = &values.to_f64_vec()[step * width..][..width];
                assert_close(&format!("{label} step {step}: top logits"), &got, want, atol, 0.0);
            }
        }
        if let Some(values) = stored.get(&format!("{label}.logits")) {
            let got: Vec<f64> = logits.iter().flat_map(Tensor::to_f64_vec).collect();
            assert_close(
                &format!("{label}: all logits"),
                &got,
                &values.to_f64_vec(),
                atol,
                0.0,
            );
        }
    }
    assert!(compared > 0, "no greedy case was compared");
}

/// Rows of `padded prompt + answer + padding`, as transformers returns them.
fn padded(prompts: &[Vec<u32>], answers: &[Vec<u32>], new_tokens: usize, pad: u32) -> Vec<Vec<u32>> {
    let row = |(prompt, answer): (&Vec<u32>, &Vec<u32>)| {
        let fill = std::iter::repeat_n(&pad, new_tokens - answer.len());
        prompt.iter().chain(answer).chain(fill).copied().collect()
    };
    prompts.iter().zip(answers).map(row).collect()
}

#[test]
fn batches_with_left_padding_continue_as_officially() {
    exact_computes().into_iter().for_each(left_padded_batches);
}

fn left_padded_batches(compute: Compute) {
    let Some(json) = golden(&format!("{FOLDER}/greedy.json")) else {
        return;
    };
    let Some(model) = model_of("base", compute) else {
        return;
    };
    let set = read_json(&json);
    let (pad, new_tokens) = (
        model.config().pad_token_id,
        set["max_new_tokens"].as_u64().unwrap() as usize,
    );
    let Some(case) = set.get("batch_leftpad") else {
        eprintln!("SKIPPED: this golden set has no batch_leftpad");
        return;
    };
    let inputs = lists(&case["input_ids"]);
    let prompts: Vec<Vec<u32>> = inputs
        .iter()
        .map(|row| row.iter().copied().skip_while(|&id| id == pad).collect())
        .collect();

    let special = special(&model);
    let left_padded = collate::left_pad(&prompts, &special);
    // What the official model makes of ids alone: padding is visible and counts in the positions.
    let labels: Vec<Vec<i32>> = inputs.iter().map(|row| vec![IGNORE; row.len()]).collect();
    let visible_padding = collate::from_ids_model(&inputs, &labels, &special).unwrap();
    let flat: Vec<u32> = inputs.concat();
    assert_eq!(
        left_padded.ids,
        flat.iter().map(|&id| id as i32).collect::<Vec<_>>()
    );
    for (b, rows) in case["position_ids"].as_array().unwrap().iter().enumerate() {
        for (k, row) in lists(rows).iter().enumerate() {
            let got: Vec<u32> = (0..left_padded.len)
                .map(|t| left_padded.positions[2 * (b * left_padded.len + t) + k] as u32)
                .collect();
            assert_eq!(&got, row, "row {k} of the position ids of sequence {b}");
        }
    }
    for (name, eos_place, batch) in [
        ("batch_leftpad", &set["eos_token_id"], &left_padded),
        (
            "batch_early_stop",
            &set["batch_early_stop"]["eos_token_id"],
            &left_padded,
        ),
        ("batch_ids_only", &set["eos_token_id"], &visible_padding),
    ] {
        let Some(case) = set.get(name) else {
            eprintln!("SKIPPED: this golden set has no {name}");
            continue;
        };
        let eos = eos_place.as_u64().expect("eos_token_id") as u32;
        let (answers, _) = greedy(&model, batch, new_tokens, eos);
        let mut want = lists(&case["sequences"]);
        // transformers stops with the last row; the goldens then are narrower.
        let width = flat.len() / inputs.len() + new_tokens;
        want.iter_mut().for_each(|row| row.resize(width, pad));
        assert_eq!(padded(&inputs, &answers, new_tokens, pad), want, "{name}");
    }
}

/// The values of a JSON-lines file of the set.
fn json_lines(relative: &str) -> Vec<Value> {
    let Some(path) = golden(relative) else {
        return Vec::new();
    };
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn text_that_is_streamed_is_the_official_text() {
    let Some(model) = golden("tokenizer/ice_text.model") else {
        return;
    };
    let tokenizer = Tokenizer::open(&model).unwrap();
    let stream = |ids: &[u32], render: &dyn Fn(&[u32]) -> String| {
        let mut stream = TextStream::new(render);
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    };
    for case in json_lines("tokenizer/chat_prompts.jsonl") {
        let chat = |ids: &[u32]| template::process_response(&tokenizer.decode(ids));
        let text = stream(&numbers(&case["generated_ids"]), &chat);
        assert_eq!(
            text,
            case["response"].as_str().unwrap(),
            "{}",
            case["generated_ids"]
        );
    }
    let decode = |ids: &[u32]| tokenizer.decode(ids);
    for (file, ids, text) in [
        ("encode_decode", "ids_no_special", "decode_no_special"),
        ("decode_ids", "ids", "decode"),
    ] {
        for case in json_lines(&format!("tokenizer/{file}.jsonl")) {
            assert_eq!(
                stream(&numbers(&case[ids]), &decode),
                case[text].as_str().unwrap(),
                "{file}: {}",
                case[ids]
            );
        }
    }
}
