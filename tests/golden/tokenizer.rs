//! Ids, texts, prompts and padding of the official tokenizer and of THUDM's preprocessing.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use glmtune::data::batch::{Batch, IGNORE};
use glmtune::data::sample::{FirstTarget, Options, OverLength, Sample, encode_ids};
use glmtune::data::{collate, template};
use glmtune::model::ModelConfig;
use glmtune::tensor::Tensor;
use glmtune::tokenizer::{Decode, Special, Tokenizer, longest_first};
use serde_json::Value;

use crate::common::{golden, goldens, manifest, read_safetensors};

/// The model file: of this set, or the one in the shared folder.
fn model_file() -> Option<PathBuf> {
    let own = goldens().join("tokenizer/ice_text.model");
    let shared = match std::env::var_os("GLMTUNE_SHARED") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"),
    };
    [own, shared.join("tokenizer/ice_text.model")]
        .into_iter()
        .find(|path| path.is_file())
}

fn tokenizer() -> Option<&'static Tokenizer> {
    static TOKENIZER: LazyLock<Option<Tokenizer>> =
        LazyLock::new(|| model_file().map(|path| Tokenizer::open(&path).unwrap()));
    if TOKENIZER.is_none() {
        eprintln!("SKIPPED: neither this golden set nor GLMTUNE_SHARED has an ice_text.model");
    }
    TOKENIZER.as_ref()
}

/// The tokenizer and the text of a file of the set.
fn open(relative: &str) -> Option<(&'static Tokenizer, String)> {
    let path = golden(relative)?;
    Some((tokenizer()?, std::fs::read_to_string(path).unwrap()))
}

fn lines(text: &str) -> Vec<Value> {
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(!lines.is_empty());
    lines
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key]
        .as_str()
        .unwrap_or_else(|| panic!("no text {key} in {value}"))
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{e} in {value}"))
}

const RAW: Decode = Decode {
    skip_special_tokens: false,
    clean_up: false,
};
const SKIP: Decode = Decode {
    skip_special_tokens: true,
    clean_up: true,
};

#[test]
fn texts_and_ids_are_those_of_the_official_tokenizer() {
    let Some((tokenizer, file)) = open("tokenizer/encode_decode.jsonl") else {
        return;
    };
    for case in lines(&file) {
        let source = text(&case, "text");
        let encoded = tokenizer.encode(source);
        assert_eq!(encoded, ids(&case["ids_no_special"]), "{source:?}");
        assert_eq!(
            tokenizer.encode_plain(source),
            ids(&case["sp_ids"]),
            "{source:?}, plain"
        );
        // Long texts are stored without their pieces.
        if let Some(expected) = case["pieces"].as_array() {
            let pieces: Vec<_> = encoded.iter().map(|&id| tokenizer.piece(id)).collect();
            assert_eq!(
                pieces,
                expected.iter().map(Value::as_str).collect::<Vec<_>>(),
                "{source:?}"
            );
        }
        let full = tokenizer.build_inputs(&encoded, None);
        assert_eq!(full, ids(&case["ids"]), "{source:?}");
        assert_eq!(
            tokenizer.decode(&encoded),
            text(&case, "decode_no_special"),
            "{source:?}"
        );
        assert_eq!(tokenizer.decode(&full), text(&case, "decode"), "{source:?}");
        assert_eq!(
            tokenizer.decode_with(&full, SKIP),
            text(&case, "decode_skip_special"),
            "{source:?}"
        );
        assert_eq!(
            tokenizer.decode_with(&full, RAW),
            text(&case, "decode_no_cleanup"),
            "{source:?}"
        );
        assert_eq!(
            tokenizer.decode_with(&encoded, RAW),
            text(&case, "sp_decode"),
            "{source:?}"
        );
    }
}

#[test]
fn any_ids_decode_to_the_official_text() {
    let Some((tokenizer, file)) = open("tokenizer/decode_ids.jsonl") else {
        return;
    };
    for case in lines(&file) {
        let ids = ids(&case["ids"]);
        assert_eq!(tokenizer.decode(&ids), text(&case, "decode"), "{ids:?}");
        assert_eq!(
            tokenizer.decode_with(&ids, SKIP),
            text(&case, "decode_skip_special"),
            "{ids:?}"
        );
        assert_eq!(
            tokenizer.decode_with(&ids, RAW),
            text(&case, "sp_decode"),
            "{ids:?}"
        );
    }
}

#[test]
fn the_vocabulary_is_the_official_one() {
    let Some((tokenizer, file)) = open("tokenizer/vocab_facts.json") else {
        return;
    };
    let facts: Value = serde_json::from_str(&file).unwrap();
    assert_eq!(
        tokenizer.vocab_size() as u64,
        facts["vocab_size"].as_u64().unwrap()
    );
    for (id, piece) in facts["piece_samples"].as_object().unwrap() {
        assert_eq!(tokenizer.piece(id.parse().unwrap()), piece.as_str());
    }
    let unknown = facts["unk_token_id"].as_u64().unwrap();
    for (piece, id) in facts["special"].as_object().unwrap() {
        let id = id.as_u64().unwrap();
        if id != unknown {
            assert_eq!(tokenizer.piece(id as u32), Some(piece.as_str()));
        }
    }
    let id = |key: &str| facts[key].as_u64().unwrap() as u32;
    let expected = Special {
        unk: id("unk_token_id"),
        sop: id("bos_token_id"),
        eop: id("eos_token_id"),
        pad: id("pad_token_id"),
        mask: id("mask_token_id"),
        gmask: id("gmask_token_id"),
    };
    assert_eq!(tokenizer.special(), expected);
}

#[test]
fn pairs_are_built_and_truncated_officially() {
    let Some((tokenizer, file)) = open("tokenizer/pairs.jsonl") else {
        return;
    };
    for case in lines(&file) {
        let (a, b) = (
            tokenizer.encode(text(&case, "a")),
            tokenizer.encode(text(&case, "b")),
        );
        assert_eq!(tokenizer.build_inputs(&a, Some(&b)), ids(&case["ids"]));
        for (key, expected) in case.as_object().unwrap() {
            if let Some(length) = key.strip_prefix("ids_truncated_") {
                let room = length.parse::<usize>().unwrap() - 3;
                let (of_a, of_b) = longest_first(a.len(), b.len(), room);
                assert_eq!(
                    tokenizer.build_inputs(&a[..of_a], Some(&b[..of_b])),
                    ids(expected),
                    "{case}"
                );
            }
        }
    }
}

/// `position_ids` of the set: `[2][S]` for each row.
fn positions(batch: &Batch, row: usize) -> [Vec<i32>; 2] {
    let of = |which| {
        (0..batch.len)
            .map(|i| batch.positions[(row * batch.len + i) * 2 + which])
            .collect()
    };
    [of(0), of(1)]
}

fn row<T: Copy>(values: &[T], batch: &Batch, row: usize) -> Vec<T> {
    values[row * batch.len..][..batch.len].to_vec()
}

/// May query `i` of a row see key `j`? The formula of `Span`.
fn visible(batch: &Batch, row: usize, i: usize, j: usize) -> bool {
    let span = batch.spans[row];
    i >= span.start && j >= span.start && (j < span.context || j <= i)
}

#[test]
fn batches_are_padded_as_by_the_official_tokenizer() {
    let Some((tokenizer, file)) = open("tokenizer/batch_padding.jsonl") else {
        return;
    };
    let special = tokenizer.special();
    for case in lines(&file) {
        let options = &case["kwargs"];
        let number = |key: &str| options[key].as_u64().map(|n| n as usize);
        let texts: Vec<&str> = case["texts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t.as_str().unwrap())
            .collect();
        let rows: Vec<Vec<u32>> = texts
            .iter()
            .map(|text| {
                let mut ids = tokenizer.encode(text);
                if options["truncation"] == true {
                    ids.truncate(longest_first(ids.len(), 0, number("max_length").unwrap() - 2).0);
                }
                tokenizer.build_inputs(&ids, None)
            })
            .collect();
        let mut len = rows.iter().map(Vec::len).max().unwrap();
        if options["padding"] == "max_length" {
            len = number("max_length").unwrap();
        }
        if let Some(multiple) = number("pad_to_multiple_of") {
            len = len.next_multiple_of(multiple);
        }
        if options["padding"].is_null() {
            assert_eq!(case["input_ids"], serde_json::json!(rows));
            continue;
        }
        let padded: Vec<Vec<u32>> = rows
            .iter()
            .map(|ids| [vec![special.pad; len - ids.len()], ids.clone()].concat())
            .collect();
        assert_eq!(case["input_ids"], serde_json::json!(padded), "{texts:?}");
        let batch = collate::from_ids_tokenizer(&padded, &[], &special).unwrap();
        for b in 0..batch.size {
            assert_eq!(
                case["position_ids"][b],
                serde_json::json!(positions(&batch, b)),
                "{texts:?}, row {b}"
            );
            for (i, expected) in case["attention_mask_true_is_masked"][b]
                .as_array()
                .unwrap()
                .iter()
                .enumerate()
            {
                let blocked = (0..len)
                    .map(|j| if visible(&batch, b, i, j) { '0' } else { '1' })
                    .collect::<String>();
                assert_eq!(
                    blocked,
                    expected.as_str().unwrap(),
                    "{texts:?}, row {b}, query {i}"
                );
            }
        }
        if len == rows.iter().map(Vec::len).max().unwrap()
            && !rows.iter().flatten().any(|&id| id == special.mask)
        {
            assert_eq!(collate::left_pad(&rows, &special), batch);
        }
    }
}

fn history(value: &Value) -> Vec<(String, String)> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn chat_prompts_and_responses_are_the_official_ones() {
    let Some((tokenizer, file)) = open("tokenizer/chat_prompts.jsonl") else {
        return;
    };
    for case in lines(&file) {
        let prompt = template::prompt(text(&case, "query"), &history(&case["history"]));
        assert_eq!(prompt, text(&case, "prompt"));
        assert_eq!(
            tokenizer.build_inputs(&tokenizer.encode(&prompt), None),
            ids(&case["input_ids"])
        );
        let response = template::process_response(&tokenizer.decode(&ids(&case["generated_ids"])));
        assert_eq!(response, text(&case, "response"));
    }
}

#[test]
fn responses_are_finished_officially() {
    let Some(path) = golden("tokenizer/process_response.json") else {
        return;
    };
    let cases: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for case in cases.as_array().unwrap() {
        assert_eq!(
            template::process_response(text(case, "input")),
            text(case, "output")
        );
    }
}

#[test]
fn samples_are_those_of_the_official_preprocessing() {
    let Some(dir) = golden("tokenizer") else { return };
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.retain(|path| {
        path.file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("preprocess_")
    });
    files.sort();
    for file in files {
        let Some(tokenizer) = tokenizer() else { return };
        preprocess(
            tokenizer,
            &serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap(),
        );
    }
}

fn preprocess(tokenizer: &Tokenizer, file: &Value) {
    let special = tokenizer.special();
    let settings = &file["settings"];
    let source = settings["max_source_length"].as_u64().unwrap() as usize;
    let target = settings["max_target_length"].as_u64().unwrap() as usize;
    let with_history = !settings["history_column"].is_null();
    let ignore_pad = settings["ignore_pad_token_for_loss"] == true;
    let examples = &file["examples"];
    let options = Options {
        max_source_length: Some(source),
        max_target_length: Some(target),
        over_length: OverLength::Official,
        first_target: FirstTarget::Sop,
        ..Options::default()
    };
    let mut samples: Vec<Sample> = Vec::new();
    let mut prompts = Vec::new();
    let mut answers = Vec::new();
    for i in 0..examples["prompt"].as_array().unwrap().len() {
        let (query, answer) = (
            examples["prompt"][i].as_str().unwrap(),
            examples["response"][i].as_str().unwrap(),
        );
        if query.is_empty() || answer.is_empty() {
            continue;
        }
        let turns = if with_history {
            history(&examples["history"][i])
        } else {
            Vec::new()
        };
        // The official training code writes a round even where there is no history, its evaluation does not.
        let prompt = if with_history {
            template::rounds(query, &turns)
        } else {
            query.to_string()
        };
        let (prompt, answer) = (tokenizer.encode(&prompt), tokenizer.encode(answer));
        samples.push(
            encode_ids(tokenizer, prompt, answer.clone(), "", &options)
                .unwrap()
                .0
                .unwrap(),
        );
        let mut prompt = tokenizer.encode(&template::prompt(query, &turns));
        prompt.truncate(source - 2);
        prompts.push(tokenizer.build_inputs(&prompt, None));
        answers.push(tokenizer.build_inputs(&answer[..answer.len().min(target - 2)], None));
    }
    let batch = collate::right_pad(
        &samples.iter().collect::<Vec<_>>(),
        special.pad,
        Some(source + target),
    );
    let expected = |part: &str, key: &str, row: usize| -> Vec<i32> {
        serde_json::from_value(file[part][key][row].clone()).unwrap()
    };
    assert_eq!(file["train"]["input_ids"].as_array().unwrap().len(), batch.size);
    for (b, sample) in samples.iter().enumerate() {
        assert_eq!(
            row(&batch.ids, &batch, b),
            expected("train", "input_ids", b),
            "row {b}"
        );
        // With ignore_pad_token_for_loss the label of every padding id is replaced, without it padding is supervised.
        let labels: Vec<i32> = row(&batch.labels, &batch, b)
            .into_iter()
            .enumerate()
            .map(|(i, label)| {
                if !ignore_pad && i >= sample.ids.len() {
                    special.pad as i32
                } else {
                    label
                }
            })
            .collect();
        assert_eq!(labels, expected("train", "labels", b), "row {b}");
    }
    let batch = collate::left_pad(&prompts, &special);
    assert_eq!(file["eval"]["input_ids"].as_array().unwrap().len(), batch.size);
    for (b, answer) in answers.iter().enumerate() {
        assert_eq!(
            row(&batch.ids, &batch, b),
            expected("eval", "input_ids", b),
            "row {b}"
        );
        assert_eq!(
            file["eval"]["position_ids"][b],
            serde_json::json!(positions(&batch, b)),
            "row {b}"
        );
        let labels: Vec<i32> = answer.iter().map(|&id| id as i32).collect();
        let pad = special.pad as i32;
        let labels: Vec<i32> = labels
            .into_iter()
            .map(|id| if ignore_pad && id == pad { IGNORE } else { id })
            .collect();
        assert_eq!(labels, expected("eval", "labels", b), "row {b}");
    }
}

/// Which derivation a forward case was made with, by its name.
fn by_the_tokenizer(file: &str) -> bool {
    let model = file.contains("model");
    !model && (file.contains("tokenizer") || file.contains("leftpad"))
}

#[test]
fn positions_and_masks_are_those_of_every_forward_case() {
    let Some(dir) = golden("chatglm_v1/checkpoint_fp16_bin") else {
        return;
    };
    let config = ModelConfig::read(&dir).unwrap();
    let special = Special {
        unk: 0,
        sop: config.bos_token_id,
        eop: config.eos_token_id,
        pad: config.pad_token_id,
        mask: config.mask_token_id,
        gmask: config.gmask_token_id,
    };
    let manifest = manifest();
    let files: Vec<&str> = manifest["files"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let mut cases = 0;
    for file in files
        .into_iter()
        .filter(|file| file.starts_with("chatglm_v1/forward/"))
    {
        let Some(path) = golden(file) else { continue };
        let tensors = read_safetensors(&path);
        let (Some(positions_ids), Some(mask)) = (tensors.get("position_ids"), tensors.get("attention_mask"))
        else {
            continue;
        };
        let rows = |tensor: &Tensor| -> Vec<Vec<i64>> {
            let (_, len) = tensor.shape().rows_and_columns();
            tensor
                .as_slice::<i64>()
                .chunks(len)
                .map(<[i64]>::to_vec)
                .collect()
        };
        let ids: Vec<Vec<u32>> = rows(&tensors["input_ids"])
            .into_iter()
            .map(|row| row.into_iter().map(|id| id as u32).collect())
            .collect();
        let labels: Vec<Vec<i32>> = rows(&tensors["labels"])
            .into_iter()
            .map(|row| row.into_iter().map(|id| id as i32).collect())
            .collect();
        let name = file.rsplit('/').next().unwrap();
        let derive = if by_the_tokenizer(name) {
            collate::from_ids_tokenizer
        } else {
            collate::from_ids_model
        };
        let batch = derive(&ids, &labels, &special).unwrap();
        assert_eq!(batch.labels, labels.concat(), "{file}");
        let stored: Vec<Vec<i32>> = rows(positions_ids)
            .into_iter()
            .map(|row| row.into_iter().map(|x| x as i32).collect())
            .collect();
        let blocked = mask.as_slice::<u8>();
        for b in 0..batch.size {
            assert_eq!(
                positions(&batch, b).as_slice(),
                &stored[2 * b..2 * b + 2],
                "{file}, row {b}"
            );
            for i in 0..batch.len {
                for j in 0..batch.len {
                    let allowed = blocked[(b * batch.len + i) * batch.len + j] == 0;
                    assert_eq!(visible(&batch, b, i, j), allowed, "{file} [{b}, {i}, {j}]");
                }
            }
        }
        cases += 1;
    }
    assert!(cases > 0, "no forward case with positions and mask");
}
