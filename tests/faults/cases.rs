//! Bad input, one case a line: the program ends with the right code and one line that names place, finding and remedy;
//! it never panics, and makes no output folder when it cannot start.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::program::{Workplace, glmtune, str};
use crate::spoil::{edit_json, halve, one_line, poke};

/// Spoils a workplace.
type Spoil = fn(&Workplace);

const LORA: &[&str] = &["--method", "lora", "--max-steps", "2"];

fn config(place: &Workplace, key: &str, value: Value) {
    edit_json(&place.model().join("config.json"), |json| json[key] = value);
}

fn weights(place: &Workplace, name: &str) {
    poke(&place.model().join("model.safetensors"), name, f32::NAN);
}

fn data(place: &Workplace, text: impl AsRef<[u8]>) {
    fs::write(place.data(), text).unwrap();
}

#[test]
fn a_model_or_data_that_cannot_be_used_is_one_line_and_no_folder_is_made() {
    const NORM: &str = "transformer.layers.1.input_layernorm.weight";
    let cases: &[(&str, Spoil, &[&str])] = &[
        (
            "no config",
            |p| fs::remove_file(p.model().join("config.json")).unwrap(),
            &["config.json", "check the path"],
        ),
        (
            "no tokenizer",
            |p| fs::remove_file(p.model().join("ice_text.model")).unwrap(),
            &["ice_text.model", "check the path"],
        ),
        (
            "no weights",
            |p| fs::remove_file(p.model().join("model.safetensors")).unwrap(),
            &["no weights"],
        ),
        (
            "half the weights",
            |p| halve(&p.model().join("model.safetensors")),
            &["model.safetensors", "truncated"],
        ),
        (
            "half the tokenizer",
            |p| halve(&p.model().join("ice_text.model")),
            &["ice_text.model", "SentencePiece"],
        ),
        (
            "a folder for a tokenizer",
            |p| {
                fs::remove_file(p.model().join("ice_text.model")).unwrap();
                fs::create_dir(p.model().join("ice_text.model")).unwrap();
            },
            &["ice_text.model", "give a file"],
        ),
        (
            "NaN in a norm",
            |p| weights(p, NORM),
            &["model.safetensors", NORM, "NaN", "damaged"],
        ),
        (
            "text for a size",
            |p| config(p, "vocab_size", json!("x")),
            &["vocab_size \"x\"", "whole number"],
        ),
        (
            "nothing for a size",
            |p| config(p, "hidden_size", json!(0)),
            &["hidden_size 0"],
        ),
        (
            "a huge size",
            |p| config(p, "num_layers", json!(1u64 << 60)),
            &["num_layers"],
        ),
        (
            "another size",
            |p| config(p, "hidden_size", json!(256)),
            &["[1312, 128] instead of [1312, 256]"],
        ),
        (
            "another depth",
            |p| config(p, "num_layers", json!(5)),
            &["missing transformer.layers.4"],
        ),
        (
            "the other vocabulary",
            |p| config(p, "vocab_size", json!(150_528)),
            &["word_embeddings", "150528"],
        ),
        (
            "other special tokens",
            |p| config(p, "bos_token_id", json!(5)),
            &["bos_token_id 5", "tokenizer"],
        ),
        (
            "no data",
            |p| fs::remove_file(p.data()).unwrap(),
            &["data.json", "check the path"],
        ),
        ("empty data", |p| data(p, ""), &["data.json", "an empty file"]),
        ("no records", |p| data(p, "[]"), &["no records"]),
        (
            "not UTF-8",
            |p| data(p, b"{\"q\": \"a\", \"a\": \"b\"}\n{\"q\": \"\xff\"}"),
            &["data.json:2", "0xff", "iconv"],
        ),
        (
            "not JSON",
            |p| data(p, "{\"q\": \"a\", \"a\": \"b\"}\n\n{oops}"),
            &["data.json:3", "no JSON", "column 2"],
        ),
        (
            "half an array",
            |p| data(p, "[{\"q\": \"a\", \"a\": \"b\"},\n"),
            &["data.json:2", "end of the file"],
        ),
        (
            "half a surrogate pair",
            |p| data(p, r#"{"q": "\ud800", "a": "b"}"#),
            &["data.json:1", "no JSON"],
        ),
        (
            "lists without end",
            |p| data(p, "[".repeat(300_000)),
            &["data.json:1", "recursion"],
        ),
        (
            "a number for text",
            |p| data(p, r#"{"q": 5, "a": "b"}"#),
            &["data.json:1", "a number in q"],
        ),
        (
            "a history of another form",
            |p| data(p, r#"{"q": "a", "a": "b", "history": [["x"]]}"#),
            &["data.json:1", "pairs"],
        ),
        (
            "unknown columns",
            |p| data(p, r#"{"foo": "a", "bar": "b"}"#),
            &["columns foo, bar", "--prompt-column"],
        ),
        (
            "no answer column in one record",
            |p| data(p, "{\"q\": \"a\", \"a\": \"b\"}\n{\"q\": \"a\"}"),
            &["data.json:2", "a column a"],
        ),
        (
            "no answers",
            |p| data(p, "{\"q\": \"a\", \"a\": \"\"}\n{\"q\": \"b\", \"a\": \" \"}"),
            &["data.json:1", "no answer"],
        ),
    ];
    for (what, spoil, words) in cases {
        let Some(place) = Workplace::new() else { return };
        spoil(&place);
        one_line(what, &mut place.train("out", LORA), 1, words);
        assert!(!place.path("out").exists(), "{what}: an output folder was made");
    }
}

#[test]
#[cfg(unix)]
fn pipes_and_loops_are_no_weights() {
    let Some(place) = Workplace::new() else { return };
    let path = place.model().join("model.safetensors");
    fs::remove_file(&path).unwrap();
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    one_line(
        "a pipe",
        &mut place.train("out", LORA),
        1,
        &["model.safetensors", "no regular file"],
    );
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("model.safetensors", &path).unwrap();
    one_line("a loop", &mut place.train("out", LORA), 1, &["model.safetensors"]);
}

#[test]
fn flags_out_of_range_are_one_line() {
    let Some(place) = Workplace::new() else { return };
    let cases: &[(&str, i32, &[&str])] = &[
        ("--learning-rate nan", 2, &["--learning-rate: found NaN"]),
        ("--learning-rate inf", 2, &["--learning-rate: found inf"]),
        ("--epochs 0", 2, &["--epochs: found 0"]),
        ("--epochs 1e300", 2, &["--epochs: found 1", "a million"]),
        ("--micro-batch-size 0", 2, &["--micro-batch-size: found 0"]),
        (
            "--micro-batch-size 99999999999",
            2,
            &["--micro-batch-size", "at most 65536"],
        ),
        (
            "--seed 18446744073709551615",
            2,
            &["--seed: found 18446744073709551615"],
        ),
        (
            "--lora-r 1000000000000",
            1,
            &["--lora-r", "GB of memory", "lower rank"],
        ),
        (
            "--lora-target qkv",
            2,
            &["--lora-target: found qkv", "query_key_value"],
        ),
        (
            "--max-target-length 2",
            2,
            &["--max-target-length is 2, expected at least 3"],
        ),
        ("--max-length 4", 2, &["--max-length is 4"]),
        (
            "--over-length drop --max-length 6",
            1,
            &["every one longer than the limits"],
        ),
        (
            "--prompt-column output --response-column output",
            2,
            &["the same column"],
        ),
        ("--val-size 10", 1, &["10 of 10 samples held back"]),
        ("--eval-data nowhere.json", 1, &["nowhere.json", "check the path"]),
        ("--threads 99999", 2, &["--threads: found 99999"]),
        ("--resume", 1, &["no checkpoint"]),
        ("--config nowhere.toml", 1, &["nowhere.toml", "check the path"]),
    ];
    for (flags, code, words) in cases {
        let (model, data, out) = (place.model(), place.data(), place.path("out"));
        let mut args = vec![
            "train",
            "--model",
            str(&model),
            "--data",
            str(&data),
            "--output",
            str(&out),
        ];
        args.extend(["--method", "lora"]);
        args.extend(flags.split(' '));
        one_line(flags, &mut glmtune(&args), *code, words);
        assert!(!out.exists(), "{flags}: an output folder was made");
    }
}

#[test]
fn a_configuration_file_is_named_with_its_key_or_line() {
    let Some(place) = Workplace::new() else { return };
    let file = place.path("run.toml");
    let cases: &[(&[u8], &[&str])] = &[
        (
            b"learnin_rate = 1.0",
            &["run.toml: ", "unknown field `learnin_rate`, expected the flags"],
        ),
        (b"lora_r = 'x'", &["run.toml: ", "lora_r", "a whole number"]),
        (b"lora_r = 4\n[[[", &["run.toml:2: "]),
        (b"seed = 1\nseed = 2", &["run.toml:2: ", "duplicate key"]),
        (b"# \xff", &["run.toml: ", "not UTF-8"]),
    ];
    for (text, words) in cases {
        fs::write(&file, text).unwrap();
        one_line(
            &String::from_utf8_lossy(text),
            &mut place.train("out", &["--config", str(&file)]),
            1,
            words,
        );
    }
}

/// A step may end in weights that are not finite although its loss was fine.
#[test]
fn weights_that_ran_away_are_not_saved() {
    let Some(place) = Workplace::new() else { return };
    let (model, data) = (place.model(), place.data());
    for (rate, steps, words) in [
        (
            "1e300",
            "1",
            &["step 1", "a trained weight is", "lora_", "not saved"][..],
        ),
        (
            "1e30",
            "30",
            &["step ", "NaN", "first seen in", "a lower --learning-rate"],
        ),
    ] {
        let out = place.path(rate);
        let mut args = vec!["train", "--model", str(&model), "--data", str(&data)];
        args.extend(["--output", str(&out), "--method", "lora", "--warmup-steps", "0"]);
        args.extend(["--learning-rate", rate, "--max-steps", steps]);
        one_line(rate, &mut glmtune(&args), 1, words);
        assert!(!out.join("adapter_model.safetensors").exists());
        assert!(!out.join("checkpoints").exists(), "{rate}: a checkpoint was kept");
    }
}
