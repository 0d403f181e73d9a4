//! Does `glmtune generate` answer the same whatever interrupts it, and does sharing what was read of a prompt change nothing?

#[path = "common/mod.rs"]
mod common;
#[path = "common/program.rs"]
mod program;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{assert_close, exact_computes, golden, half_computes, values};
use glmtune::checkpoint::Checkpoint;
use glmtune::data::collate;
use glmtune::generate::{GenerationConfig, Generator, Sequence, number};
use glmtune::model::tune::{self, PrefixConfig, Tuning};
use glmtune::model::{KvCache, LoadOptions, Model};
use glmtune::tensor::{Compute, DType, Device, Tensor};
use glmtune::tokenizer::Special;
use program::{Workplace, fails, glmtune, signal, str, succeeds, text};
use serde_json::Value;

const BASE: &str = "chatglm_v1/checkpoint_fp16_bin";

fn load(compute: Compute, prefix: bool) -> Option<Model> {
    let checkpoint = Checkpoint::open(&golden(BASE)?).unwrap();
    let options = LoadOptions {
        compute,
        ..LoadOptions::default()
    };
    let mut model = Model::load(&checkpoint, &options).unwrap();
    if prefix {
        let config = PrefixConfig {
            pre_seq_len: 5,
            ..PrefixConfig::default()
        };
        tune::apply(&mut model, &Tuning::PTuning(config), 7).unwrap();
    }
    Some(model)
}

fn special(model: &Model) -> Special {
    let config = model.config();
    Special {
        mask: config.mask_token_id,
        gmask: config.gmask_token_id,
        sop: config.bos_token_id,
        eop: config.eos_token_id,
        pad: config.pad_token_id,
        unk: 0,
    }
}

/// `count` words, `[gMASK]`, `<sop>`.
fn prompt(model: &Model, count: u32, seed: u32) -> Vec<u32> {
    let config = model.config();
    let words = (0..count).map(|i| 10 + (i * 37 + seed * 101) % 900);
    words
        .chain([config.gmask_token_id, config.bos_token_id])
        .collect()
}

/// The logits after the prompts and after each of four tokens, which differ from sequence to sequence.
fn steps(model: &Model, cache: &mut KvCache, size: u32, first: Tensor) -> Vec<Tensor> {
    let mut logits = vec![first];
    for step in 0..4 {
        let tokens: Vec<u32> = (0..size).map(|b| 20 + 7 * b + step).collect();
        logits.push(model.decode(cache, &tokens).unwrap());
    }
    logits
}

fn same_bits(what: &str, a: &[Tensor], b: &[Tensor]) {
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(a.bytes() == b.bytes(), "{what}: logits after {step} tokens");
    }
}

/// Three sequences with one prompt and two with another: what is read once is what is read for each.
#[test]
fn a_prompt_that_is_read_once_is_a_prompt_read_for_each_sequence() {
    for compute in [exact_computes(), half_computes()].concat() {
        for prefix in [false, true] {
            let Some(model) = load(compute, prefix) else {
                return;
            };
            let what = format!("{} {}, prefix {prefix}", compute.device, compute.dtype);
            let keys = model.prefix_keys().unwrap();
            let alone = |ids: &Vec<u32>| {
                let batch = collate::left_pad(std::slice::from_ref(ids), &special(&model));
                model.read(&batch, &keys).unwrap()
            };
            let (long, short) = (prompt(&model, 11, 1), prompt(&model, 6, 2));
            let rows = [&long, &long, &short, &long, &short];
            let capacity = long.len() + 4;
            let cache = || model.cache_with(5, capacity, &keys).unwrap();

            let (a, b) = (alone(&long), alone(&short));
            let mut once = cache();
            let first = model.fork(&mut once, &[&a, &a, &b, &a, &b]).unwrap();
            let once = steps(&model, &mut once, 5, first);

            let read = rows.map(&alone);
            let mut each = cache();
            let first = model.fork(&mut each, &read.each_ref()).unwrap();
            same_bits(&what, &once, &steps(&model, &mut each, 5, first));

            // The batch as it is read without sharing, with padding. On the CPU every product but the head's has more rows than
            // those that are computed in another way, alone and together.
            let ids: Vec<Vec<u32>> = rows.into_iter().cloned().collect();
            let batch = collate::left_pad(&ids, &special(&model));
            let mut together = model.cache(5, capacity).unwrap();
            let first = model.prefill(&mut together, &batch).unwrap();
            let together = steps(&model, &mut together, 5, first);
            if compute.device == Device::Cpu {
                same_bits(&format!("{what}, read together"), &once, &together);
            } else if compute.dtype == DType::F32 {
                // Which kernel computes a product depends on the number of its rows.
                for (a, b) in once.iter().zip(&together) {
                    assert_close(&what, &values(a), &values(b), 5e-5, 1e-5);
                }
            }
        }
    }
}

#[test]
fn samples_depend_on_their_numbers_alone() {
    let Some(model) = load(Compute::cpu(DType::F32), true) else {
        return;
    };
    let config = GenerationConfig {
        max_new_tokens: Some(6),
        temperature: 3.0,
        ..GenerationConfig::default()
    };
    let prompts = [prompt(&model, 9, 1), prompt(&model, 5, 2)];
    let go = |generator: &mut Generator<'_>, places: &[(usize, u64)]| {
        let sequences: Vec<Sequence<'_>> = places
            .iter()
            .map(|&(i, sample)| Sequence {
                prompt: &prompts[i],
                number: number(i as u64, sample),
            })
            .collect();
        let mut on_token = |_, _| ControlFlow::Continue(());
        generator
            .samples(&sequences, &special(&model), &config, &mut on_token)
            .unwrap()
    };
    let mut generator = Generator::new(&model).unwrap();
    let all = go(&mut generator, &[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
    assert_eq!(
        all.speed.prompt_tokens,
        prompts[0].len() + prompts[1].len(),
        "read once each"
    );
    let distinct: std::collections::BTreeSet<_> = all.sequences.iter().collect();
    assert_eq!(distinct.len(), 6, "each draws from its own stream");
    // In another batch of as many, in another order; the prompt read last is not read again.
    let other = go(&mut generator, &[(1, 2), (1, 0), (0, 1), (0, 7), (0, 0), (0, 2)]);
    assert_eq!(other.speed.prompt_tokens, prompts[0].len());
    for (here, there) in [(0, 5), (1, 3), (2, 1), (4, 0), (5, 2)] {
        assert_eq!(other.sequences[here], all.sequences[there]);
    }
    // The numbers of single answers are those of sample 0.
    let batch = collate::left_pad(&[prompts[0].clone(), prompts[1].clone()], &special(&model));
    let plain = glmtune::generate::generate(&model, &batch, &[0, 1], &config, &mut |_, _| {
        ControlFlow::Continue(())
    });
    let plain = plain.unwrap().sequences;
    assert_eq!([&plain[0], &plain[1]], [&all.sequences[0], &all.sequences[3]]);
}

#[test]
fn what_does_not_fit_a_cache_is_refused() {
    let Some(model) = load(Compute::cpu(DType::F32), false) else {
        return;
    };
    let ids = prompt(&model, 6, 1);
    let special = special(&model);
    let keys = model.prefix_keys().unwrap();
    let two = collate::left_pad(&[ids.clone(), ids.clone()], &special);
    assert!(model.read(&two, &keys).is_err());
    let read = model.read(&collate::left_pad(&[ids], &special), &keys).unwrap();
    let mut cache = model.cache(2, 9).unwrap();
    assert!(model.fork(&mut cache, &[&read]).is_err());
    let mut small = model.cache(1, 5).unwrap();
    assert!(model.fork(&mut small, &[&read]).is_err());
    model.fork(&mut cache, &[&read, &read]).unwrap();
}

/// A place with questions of different lengths.
struct Questions {
    place: Workplace,
    count: usize,
}

impl Questions {
    fn new() -> Option<Self> {
        Self::with(11)
    }

    fn with(count: usize) -> Option<Self> {
        let questions = Self {
            place: Workplace::new()?,
            count,
        };
        let lines: Vec<String> = (0..questions.count)
            .map(|i| {
                serde_json::json!({"id": i, "prompt": "数到".repeat(1 + i % 4) + &i.to_string()}).to_string()
                    + "\n"
            })
            .collect();
        std::fs::write(questions.input(), lines.concat()).unwrap();
        Some(questions)
    }

    fn input(&self) -> PathBuf {
        self.place.path("questions.jsonl")
    }

    /// Long random answers of `input` to `output`.
    fn generate(&self, input: &Path, output: &Path, extra: &[&str]) -> Command {
        let model = self.place.model();
        let mut args = vec![
            "generate",
            "--model",
            str(&model),
            "--input",
            str(input),
            "--output",
            str(output),
        ];
        args.extend("--temperature 30 --top-k 0 --top-p 1 --max-new-tokens 24 --device cpu".split(' '));
        args.extend(extra);
        glmtune(&args)
    }

    fn run(&self, output: &str, extra: &[&str]) -> Vec<Value> {
        let output = self.place.path(output);
        succeeds(&self.generate(&self.input(), &output, extra).output().unwrap());
        rows(&output)
    }
}

fn rows(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// How many batches a run has written down.
fn batches(output: &Path) -> usize {
    let partial = PathBuf::from(format!("{}.partial", output.display()));
    let bytes = std::fs::read(partial).unwrap_or_default();
    bytes
        .iter()
        .filter(|&&byte| byte == b'\n')
        .count()
        .saturating_sub(1)
}

/// Starts a run and waits until it has written `count` batches.
fn start(mut command: Command, output: &Path, count: usize) -> Child {
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while batches(output) < count && child.try_wait().unwrap().is_none() {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "no {count} batches after two minutes"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

/// Goes through a case with more and more questions until a run of them is long enough to be interrupted: `case` is false where it
/// ended first.
fn interrupted(case: impl Fn(&Questions) -> bool) {
    for count in [40, 200, 1000] {
        let Some(q) = Questions::with(count) else { return };
        if case(&q) {
            return;
        }
        eprintln!("{count} questions were answered before the signal came");
    }
    panic!("every run ended before its signal");
}

/// Ends a run at once when it has written `count` batches; `None`: it had ended.
fn kill(command: Command, output: &Path, count: usize) -> Option<()> {
    let mut child = start(command, output, count);
    if child.try_wait().unwrap().is_none() {
        signal(&child, "KILL");
    }
    let status = child.wait().unwrap();
    match status.code() {
        None => Some(()),
        Some(code) => {
            assert_eq!(code, 0, "it failed by itself");
            None
        }
    }
}

#[test]
fn samples_are_runs_of_their_own() {
    let Some(q) = Questions::new() else { return };
    let all = q.run("all.jsonl", &["--samples", "3", "--batch-size", "6"]);
    assert_eq!(all.len(), 3 * q.count);
    for (i, row) in all.iter().enumerate() {
        assert_eq!(
            (row["id"].as_u64(), row["sample"].as_u64()),
            (Some(i as u64 / 3), Some(i as u64 % 3))
        );
    }
    assert_ne!(all[0]["predict"], all[1]["predict"]);
    for sample in 0..3usize {
        let first = sample.to_string();
        let one = q.run(
            &format!("{sample}.jsonl"),
            &["--samples", "1", "--first-sample", &first, "--batch-size", "5"],
        );
        let of_all: Vec<&Value> = all.iter().skip(sample).step_by(3).collect();
        assert_eq!(one.iter().collect::<Vec<_>>(), of_all, "sample {sample}");
    }
    // Without --samples: the answers of sample 0, and no field that says so.
    let plain = q.run("plain.jsonl", &["--batch-size", "7"]);
    for (plain, sampled) in plain.iter().zip(all.iter().step_by(3)) {
        assert_eq!(plain["predict"], sampled["predict"]);
        assert!(plain.get("sample").is_none());
    }
    let greedy = [
        "generate",
        "--model",
        "m",
        "--prompt",
        "x",
        "--greedy",
        "--samples",
        "2",
    ];
    let line = fails(&glmtune(&greedy).output().unwrap(), 2);
    assert!(line.contains("the same answer every time"), "{line}");
}

#[test]
fn a_run_that_is_killed_goes_on_to_the_same_answers() {
    interrupted(goes_on_to_the_same_answers);
}

fn goes_on_to_the_same_answers(q: &Questions) -> bool {
    let settings = ["--samples", "2", "--batch-size", "3"];
    let output = q.place.path("killed.jsonl");
    let resumed = [&settings[..], &["--resume"]].concat();
    if kill(q.generate(&q.input(), &output, &settings), &output, 2).is_none() {
        return false;
    }
    assert!(batches(&output) >= 2 && !output.exists());
    // Ctrl-C: the batch at hand is finished, and how to go on is said.
    let done = batches(&output);
    let mut child = start(q.generate(&q.input(), &output, &resumed), &output, done + 1);
    if child.try_wait().unwrap().is_none() {
        signal(&child, "INT");
    }
    let stopped = child.wait_with_output().unwrap();
    if stopped.status.success() {
        return false;
    }
    let stderr = text(&stopped.stderr);
    assert_eq!(stopped.status.code(), Some(130), "{stderr}");
    assert!(
        stderr.contains("going on after") && stderr.contains("--resume goes on"),
        "{stderr}"
    );
    assert!(batches(&output) > done && !output.exists());
    // A file of that name is there until all answers are.
    std::fs::write(&output, "old").unwrap();
    let replacing = [&resumed[..], &["--overwrite"]].concat();
    succeeds(&q.generate(&q.input(), &output, &replacing).output().unwrap());
    q.run("whole.jsonl", &settings);
    let whole = std::fs::read(q.place.path("whole.jsonl")).unwrap();
    assert!(std::fs::read(&output).unwrap() == whole, "the answers differ");
    assert_eq!(batches(&output), 0, "the partial file is gone");
    assert!(!q.place.path("killed.jsonl.partial").exists());
    // Nothing to go on with: the answers stay.
    let line = fails(&q.generate(&q.input(), &output, &resumed).output().unwrap(), 1);
    assert!(line.contains("a file that exists"), "{line}");
    true
}

#[test]
fn what_changed_since_is_refused() {
    interrupted(refuses_what_changed);
}

fn refuses_what_changed(q: &Questions) -> bool {
    let output = q.place.path("answers.jsonl");
    let begun = q.generate(&q.input(), &output, &["--batch-size", "2"]);
    if kill(begun, &output, 1).is_none() {
        return false;
    }
    let kept = std::fs::read(q.place.path("answers.jsonl.partial")).unwrap();
    let refused = |extra: &[&str], says: &[&str]| {
        let line = fails(&q.generate(&q.input(), &output, extra).output().unwrap(), 1);
        for say in says {
            assert!(line.contains(say), "{extra:?}: {line}");
        }
    };
    refused(
        &["--batch-size", "2"],
        &["answers of an earlier run", "--resume", "--overwrite"],
    );
    refused(
        &["--batch-size", "4", "--resume"],
        &["--batch-size: 2", "--batch-size: 4, as now"],
    );
    refused(&["--batch-size", "2", "--resume", "--seed", "5"], &["--seed: 0"]);
    refused(
        &["--batch-size", "2", "--resume", "--load-in", "4bit"],
        &["--load-in", "Stored"],
    );
    std::fs::write(q.input(), "{\"prompt\": \"别的\"}\n").unwrap();
    refused(&["--batch-size", "2", "--resume"], &["--input: "]);
    assert!(std::fs::read(q.place.path("answers.jsonl.partial")).unwrap() == kept);
    succeeds(
        &q.generate(&q.input(), &output, &["--overwrite"])
            .output()
            .unwrap(),
    );
    assert_eq!(rows(&output).len(), 1);
    true
}

/// A pipe is read once: what was read of it is what the journal is compared with.
#[cfg(unix)]
#[test]
fn questions_through_a_pipe_are_gone_on_with() {
    interrupted(|q| {
        let output = q.place.path("answers.jsonl");
        let piped = |extra: &[&str]| {
            let mut command = q.generate(Path::new("/dev/stdin"), &output, extra);
            let (reader, mut writer) = std::io::pipe().unwrap();
            let questions = std::fs::read(q.input()).unwrap();
            // It ends with its reader.
            std::thread::spawn(move || std::io::Write::write_all(&mut writer, &questions));
            command.stdin(reader);
            command
        };
        if kill(piped(&[]), &output, 1).is_none() {
            return false;
        }
        let done = batches(&output);
        let resumed = piped(&["--resume"]).stderr(Stdio::piped()).output().unwrap();
        let stderr = succeeds(&resumed);
        let said = format!("going on after {} of {} answers", done * 8, q.count);
        assert!(stderr.contains(&said), "{stderr}");
        assert_eq!(rows(&output).len(), q.count);
        true
    });
}

#[test]
fn a_bad_line_is_named_and_nothing_is_left_behind() {
    let Some(q) = Questions::new() else { return };
    let output = q.place.path("answers.jsonl");
    let long = format!(
        "{{\"prompt\": \"a\"}}\n\n{{\"prompt\": \"{}\"}}\n",
        "很长".repeat(200)
    );
    for (name, content, extra, says) in [
        (
            "a.jsonl",
            "{\"prompt\": \"a\"}\n{\"prompt\": \n",
            &[][..],
            "a.jsonl:2: found no JSON",
        ),
        (
            "b.jsonl",
            "{\"prompt\": \"a\"}\n\n{\"prompt\": \"\"}\n",
            &[],
            "b.jsonl:3: found an empty question",
        ),
        (
            "c.json",
            "[{\"prompt\": \"a\"},\n {\"q\": 1}]",
            &[],
            "c.json:2: found",
        ),
        ("d.jsonl", &long, &["--max-length", "64"], "d.jsonl:3: found "),
        (
            "e.txt",
            "你好\n{\"prompt\": \"b\"}\n",
            &[],
            "e.txt:2: found a record of JSON",
        ),
        ("f.txt", "\n\n", &[], "f.txt: found no records"),
    ] {
        let input = q.place.path(name);
        std::fs::write(&input, content).unwrap();
        let line = fails(&q.generate(&input, &output, extra).output().unwrap(), 1);
        assert!(line.contains(says), "{line}");
        assert!(
            !output.exists() && !q.place.path("answers.jsonl.partial").exists(),
            "{name}"
        );
    }
    std::fs::write(&output, "years of work").unwrap();
    let line = fails(&q.generate(&q.input(), &output, &[]).output().unwrap(), 1);
    assert!(
        line.contains("a file that exists") && line.contains("--overwrite"),
        "{line}"
    );
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "years of work");
    let nowhere = output.join("answers.jsonl");
    let line = fails(&q.generate(&q.input(), &nowhere, &[]).output().unwrap(), 1);
    assert!(line.contains("no folder"), "{line}");
    if Path::new("/proc/self").exists() {
        let line = fails(
            &q.generate(&q.input(), Path::new("/proc/answers.jsonl"), &[])
                .output()
                .unwrap(),
            1,
        );
        assert!(
            line.contains("/proc/answers.jsonl.partial: cannot create"),
            "{line}"
        );
    }
}

#[test]
fn plain_lines_are_prompts_and_a_pipe_takes_the_answers() {
    let Some(q) = Questions::new() else { return };
    let input = q.place.path("prompts.txt");
    std::fs::write(&input, "数到3\r\n\n数到4\n").unwrap();
    let output = q.place.path("answers.jsonl");
    succeeds(&q.generate(&input, &output, &[]).output().unwrap());
    let rows = rows(&output);
    let asked: Vec<_> = rows.iter().map(|row| row["prompt"].as_str().unwrap()).collect();
    assert_eq!(asked, ["数到3", "数到4"]);
    if Path::new("/dev/stdout").exists() {
        let piped = q
            .generate(&input, Path::new("/dev/stdout"), &[])
            .output()
            .unwrap();
        succeeds(&piped);
        assert!(piped.stdout == std::fs::read(&output).unwrap());
    }
    let model = q.place.model();
    let single = [
        "generate",
        "--model",
        str(&model),
        "--prompt",
        "数到3",
        "--max-new-tokens",
        "5",
    ];
    let two = glmtune(&[&single[..], &["--samples", "2"]].concat())
        .output()
        .unwrap();
    succeeds(&two);
    let two = text(&two.stdout);
    assert!(
        two.starts_with("[sample 0]\n") && two.contains("[sample 1]\n"),
        "{two}"
    );
}
