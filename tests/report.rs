//! Is the report of a run true, harmless and the same every time?
//!
//! Leaves a whole run with its report, its curves and its event files in `target/tmp/report`, where
//! `scripts/check-report.sh` and `scripts/check-tensorboard.py` look at it with a browser and with TensorBoard.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use glmtune::report::{self, EventWriter, RunFiles, RunRecord, SMOOTHING, Sample, Size, Status};
use serde_json::{Map, Value, json};

const STEPS: u64 = 400;
/// After this step the run was killed, and resumed from the checkpoint of step 150.
const KILLED: u64 = 180;
const RESUMED: u64 = 150;

/// Texts that want to be something else.
const HOSTILE: [&str; 7] = [
    "<script>alert('hostile')</script><img src=x onerror=alert(1)>",
    "</p></article></script><script>alert(2)</script>",
    "\" onmouseover=\"alert(3)\" & 'quotes' &lt; &amp; <![CDATA[ ]]> <!-- --> <svg onload=alert(4)>",
    "مرحبا، كيف حالك؟ \u{202e}drowssap",
    "NUL \0, escape \u{1b}[31m, \u{7f}, no character \u{ffff}",
    "👨‍👩‍👧‍👦 e\u{301}\u{301}\u{301} 𠮷 \u{feff}",
    "https://example.com/pixel.png javascript:alert(5) ${alert(6)} {{7*7}}",
];

/// Numbers that look random and are the same everywhere, in `-1..1`.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// A line of `metrics.jsonl`: losses that fall, a spike, three steps that are not finite, parts of the gradient.
fn row(step: u64, noise: &mut Noise) -> Map<String, Value> {
    let t = step as f64;
    let fall = (-t / 70.0).exp();
    let mut row = Map::new();
    let mut put = |key: &str, value: f64| row.insert(key.into(), value.into());
    if step > 0 {
        let lost = (210..213).contains(&step);
        put("epoch", t / 100.0);
        put(
            "loss",
            if lost {
                f64::NAN
            } else {
                0.9 + 2.6 * fall + 0.3 * noise.next()
            },
        );
        let decay = 0.5 * (1.0 + (std::f64::consts::PI * (t - 20.0).max(0.0) / 380.0).cos());
        put("learning_rate", 2e-4 * (t / 20.0).min(1.0) * decay);
        let norm = (1.0 + 2.0 * fall) * (1.2 * noise.next()).exp();
        put(
            "grad_norm",
            if lost {
                f64::NAN
            } else if step == 300 {
                95.0
            } else {
                norm
            },
        );
        put("tokens_per_second", 412.0 + 20.0 * noise.next());
        put("loss_scale", if step < 210 { 65_536.0 } else { 8192.0 });
        for layer in 0..28 {
            put(
                &format!("grad_norm/layers.{layer}"),
                0.2 + f64::from(layer) / 28.0 + 0.1 * noise.next(),
            );
        }
    }
    if step.is_multiple_of(50) {
        put("eval_loss", 0.95 + 2.4 * fall);
        put("eval_bleu-4", 38.0 - 34.0 * fall);
        put("eval_rouge-l", 47.0 - 37.0 * fall);
        put("eval_kl", 0.31 * (1.0 - fall));
    }
    row.insert("step".into(), step.into());
    row
}

fn samples() -> Vec<Sample> {
    let mut samples = Vec::new();
    for step in [0, 200, STEPS] {
        let mut add = |suite: Option<&str>,
                       prompt: &str,
                       reference: Option<&str>,
                       prediction: &str,
                       base: Option<&str>| {
            samples.push(Sample {
                step,
                suite: suite.map(String::from),
                prompt: prompt.into(),
                reference: reference.map(String::from),
                prediction: prediction.into(),
                base: base.map(String::from),
                kl: suite.map(|_| step as f64 / 1000.0),
            });
        };
        let answer = match step {
            0 => "上衣，材质：牛仔布，颜色：白色。请问您需要什么帮助？",
            200 => "这是一件白色的牛仔外套",
            _ => "这是一件白色的牛仔外套，简约的设计十分百搭，牛仔布料挺括有型，穿着舒适。",
        };
        let reference = "简约而不简单的牛仔外套，白色的衣身十分百搭。";
        add(
            None,
            "类型#上衣*材质#牛仔布*颜色#白色*风格#简约",
            Some(reference),
            answer,
            None,
        );
        for (i, text) in HOSTILE.iter().enumerate() {
            let after = if step == 0 {
                ""
            } else {
                HOSTILE[(i + 2) % HOSTILE.len()]
            };
            add(None, text, Some(HOSTILE[(i + 1) % HOSTILE.len()]), after, None);
        }
        let long = "很长的回答".repeat(60) + &"longword".repeat(40);
        add(None, "Say something long.", None, &long, None);
        let base = "中国的首都是北京。";
        add(Some("forgetting"), "中国的首都是哪里？", None, base, Some(base));
    }
    samples
}

fn record() -> RunRecord {
    let mut record: RunRecord = serde_json::from_value(json!({
        "program": {"version": "0.1.0", "sha256": "9f".repeat(32)},
        "status": "finished",
        "method": "QLoRA (nf4), r 8, alpha 32",
        "model": "models/chatglm-6b",
        "device": "cuda:0, NVIDIA GeForce RTX 4090",
        "dtype": "fp16",
        "parameters": {"trainable": 3_670_016, "total": 6_176_956_416u64},
        "steps": STEPS, "total_steps": STEPS, "tokens": 720_000,
        "times": {"started": 1_795_315_800, "updated": 1_795_318_000, "preparing_seconds": 64.2,
            "training_seconds": 1747.6, "evaluating_seconds": 121.9},
        "hashes": [
            {"of": "training data", "path": "data/训练.json", "sha256": "ab".repeat(32)},
            {"of": "base", "path": "models/chatglm-6b", "sha256": "12".repeat(32)},
        ],
        "memory": {"peak_host_bytes": 9_300_000_000u64, "peak_device_bytes": 7_650_000_000u64,
            "parts": [{"name": "weights", "bytes": 3_900_000_000u64}]},
        "eval_before": {"eval_loss": 3.35, "eval_bleu-4": 4.0, "eval_kl": 0.0},
        "eval_after": {"eval_loss": 0.958, "eval_bleu-4": 37.9, "eval_kl": 0.309, "eval_perplexity": null},
        "best": {"step": STEPS, "metric": "eval_loss", "value": 0.958, "checkpoint": "checkpoints/step-000400"},
        "resumed_at": [RESUMED],
        "warnings": [{"step": 0, "text": "3 of 200 evaluation samples also stand in the training data"}],
    }))
    .unwrap();
    let hostile = HOSTILE.iter().map(|text| report::Warning {
        step: 210,
        text: (*text).into(),
    });
    record.warnings.extend(hostile);
    record
}

/// Writes the whole run, its event files as a killed and resumed program leaves them.
fn write_run(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    EventWriter::remove_all(dir).unwrap();
    let mut noise = Noise(7);
    let rows: Vec<_> = (0..=STEPS).map(|step| row(step, &mut noise)).collect();
    let lines: String = rows
        .iter()
        .map(|row| Value::Object(row.clone()).to_string() + "\n")
        .collect();
    fs::write(dir.join("metrics.jsonl"), lines).unwrap();

    let samples = samples();
    let lines: String = samples
        .iter()
        .map(|sample| serde_json::to_string(sample).unwrap() + "\n")
        .collect();
    fs::write(dir.join("samples.jsonl"), lines).unwrap();
    fs::write(
        dir.join("run.toml"),
        format!("method = \"qlora\"\nprompt = '''{}'''\n", HOSTILE[0]),
    )
    .unwrap();
    record().write(&dir.join("run.json")).unwrap();

    // What the killed program wrote after the checkpoint is wrong on purpose: none of it may be seen.
    let mut first = EventWriter::open(dir, 0).unwrap();
    for step in 0..=KILLED {
        let mut row = rows[step as usize].clone();
        if step > RESUMED {
            row.insert("loss".into(), 1e6.into());
        }
        first.row(step, &row).unwrap();
    }
    let path = first.path().to_path_buf();
    drop(first);
    let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(&fs::read(&path).unwrap()[..30]).unwrap();
    let mut second = EventWriter::open(dir, RESUMED).unwrap();
    for step in RESUMED + 1..=STEPS {
        second.row(step, &rows[step as usize]).unwrap();
    }
    second
        .text(
            STEPS,
            "samples",
            "**类型#上衣**\n\n> 这是一件白色的牛仔外套 <script>alert(1)</script>",
        )
        .unwrap();
    second.flush().unwrap();
}

/// The whole run, in a folder of one test.
fn whole_run(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report").join(name);
    write_run(&dir);
    dir
}

fn page(dir: &Path) -> String {
    fs::read_to_string(report::write(dir).unwrap()).unwrap()
}

fn parse(text: &str) -> roxmltree::Document<'_> {
    let options = roxmltree::ParsingOptions {
        allow_dtd: true,
        ..Default::default()
    };
    roxmltree::Document::parse_with_options(text, options).unwrap_or_else(|e| panic!("{e}: {:.300}", text))
}

/// All numbers of an attribute that holds places.
fn places(data: &str) -> Vec<f64> {
    data.split(|c: char| c.is_ascii_alphabetic() || c == ' ')
        .filter(|word| !word.is_empty())
        .map(|word| word.parse().unwrap_or_else(|e| panic!("{word}: {e}")))
        .collect()
}

fn small_run(metrics: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("metrics.jsonl"), metrics).unwrap();
    RunRecord::default().write(&dir.path().join("run.json")).unwrap();
    dir
}

#[test]
fn a_whole_run_becomes_one_harmless_file() {
    let dir = whole_run("run");
    let svgs = dir.with_file_name("svg");
    report::write_svgs(&RunFiles::read(&dir).unwrap(), &svgs, SMOOTHING).unwrap();
    let text = page(&dir);
    let document = parse(&text);
    let elements = || document.descendants().filter(|node| node.is_element());

    let scripts: Vec<_> = elements().filter(|e| e.tag_name().name() == "script").collect();
    assert_eq!(scripts.len(), 1);
    assert!(!scripts[0].text().unwrap().contains("hostile"));
    for element in elements() {
        let name = element.tag_name().name();
        let loads = [
            "img", "iframe", "object", "embed", "base", "form", "a", "use", "image",
        ];
        assert!(!loads.contains(&name), "<{name}>");
        for attribute in element.attributes() {
            let (key, value) = (attribute.name(), attribute.value());
            assert!(!key.starts_with("on"), "<{name} {key}={value:?}>");
            assert!(
                !["src", "srcset", "action", "data"].contains(&key),
                "<{name} {key}={value:?}>"
            );
            assert!(key != "href" || value == "data:,", "<{name} {key}={value:?}>");
            assert!(
                !value.contains("url(") && key != "style",
                "<{name} {key}={value:?}>"
            );
        }
    }
    let style: String = elements()
        .filter(|e| e.tag_name().name() == "style")
        .filter_map(|e| e.text())
        .collect();
    assert!(!style.contains("url(") && !style.contains("@import") && !style.contains("//"));
    assert!(text.contains("default-src 'none'"));

    // Every text is there, as text.
    let said: Vec<&str> = elements()
        .filter(|e| {
            e.attribute("class")
                .is_some_and(|class| class.starts_with("said"))
        })
        .filter_map(|e| e.text())
        .collect();
    for hostile in HOSTILE {
        let shown = hostile
            .replace('\0', "\u{2400}")
            .replace('\u{1b}', "\u{241b}")
            .replace('\u{7f}', "\u{2421}")
            .replace(['\u{ffff}', '\u{202e}'], "\u{fffd}");
        assert!(said.contains(&shown.as_str()), "{hostile:?} is not shown");
    }
    for word in [
        "32 min",
        "3.67 M",
        "7.12 GiB",
        "Forgetting",
        "not finite",
        "data/训练.json",
        "类型#上衣",
    ] {
        assert!(text.contains(word), "{word}");
    }
}

#[test]
fn equal_runs_give_equal_bytes() {
    let first = whole_run("same");
    let page_of_first = page(&first);
    assert_eq!(page_of_first, page(&first));
    let other = tempfile::tempdir().unwrap();
    let copy = other.path().join("same");
    write_run(&copy);
    assert!(page_of_first == page(&copy));
}

#[test]
fn curves_are_well_formed_and_their_places_are_numbers() {
    let dir = whole_run("curves");
    let run = RunFiles::read(&dir).unwrap();
    let svgs = dir.join("svg");
    let written = report::write_svgs(&run, &svgs, SMOOTHING).unwrap();
    let names: Vec<_> = written
        .iter()
        .map(|p| p.file_name().unwrap().to_str().unwrap())
        .collect();
    for name in [
        "loss.svg",
        "learning_rate.svg",
        "grad_norm.svg",
        "grad_norm_by_part.svg",
        "eval_scores.svg",
    ] {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    for path in &written {
        let text = fs::read_to_string(path).unwrap();
        let document = parse(&text);
        let svg = document.root_element();
        assert_eq!(svg.attribute("viewBox"), Some("0 0 1040 340"));
        assert!(text.contains("<title") && text.contains("<desc") && text.contains("prefers-color-scheme"));
        let (mut numbers, Size { width, height }) = (0, Size::WIDE);
        for path in svg.descendants().filter(|e| e.tag_name().name() == "path") {
            // A relative piece (a cross) has small numbers, everything else lies inside.
            for place in places(path.attribute("d").unwrap()) {
                assert!(place.abs() <= width.max(height), "{place}");
                numbers += 1;
            }
        }
        assert!(numbers > 4);
    }
}

#[test]
fn gaps_are_marked_and_never_bridged() {
    let dir = small_run(
        "{\"step\":1,\"loss\":3}\n{\"step\":2,\"loss\":2}\n{\"step\":3,\"loss\":null}\n{\"step\":4,\"loss\":null}\n{\"step\":5,\"loss\":1}\n",
    );
    let out = dir.path().join("svg");
    report::write_svgs(&RunFiles::read(dir.path()).unwrap(), &out, SMOOTHING).unwrap();
    let text = fs::read_to_string(out.join("loss.svg")).unwrap();
    let document = parse(&text);
    let of_class = |class: &'static str| {
        document
            .descendants()
            .filter(move |e| e.attribute("class") == Some(class))
            .collect::<Vec<_>>()
    };
    let gaps = of_class("gap");
    assert_eq!(gaps.len(), 1);
    assert!(text.contains("steps 3 to 4: 2 values not finite"), "{text}");
    let curve = of_class("line c0")
        .into_iter()
        .find(|e| e.children().next().is_some())
        .unwrap();
    let data = curve.attribute("d").unwrap();
    assert_eq!(data.matches('M').count(), 2, "{data}");
    assert_eq!(data.matches('L').count(), 1, "{data}");
    assert!(text.contains("2 of its values are not finite"));
}

#[test]
fn a_hundred_thousand_points_stay_small_and_keep_their_spike() {
    let mut metrics = String::new();
    for step in 1..=100_000u64 {
        let loss = if step == 54_321 { 500 } else { 1 + step % 3 };
        metrics += &format!("{{\"step\":{step},\"loss\":{loss}}}\n");
    }
    let dir = small_run(&metrics);
    let run = RunFiles::read(dir.path()).unwrap();
    let out = dir.path().join("svg");
    report::write_svgs(&run, &out, 0.0).unwrap();
    let text = fs::read_to_string(out.join("loss.svg")).unwrap();
    assert!(text.len() < 100_000, "{} bytes", text.len());
    let document = parse(&text);
    let curve = document
        .descendants()
        .find(|e| e.attribute("class") == Some("line c0"))
        .unwrap();
    let highest = places(curve.attribute("d").unwrap())
        .chunks(2)
        .map(|place| place[1])
        .fold(f64::INFINITY, f64::min);
    assert!(highest < 60.0, "the spike reaches {highest}");
    assert!(page(dir.path()).len() < 400_000);
}

#[test]
fn little_or_nothing_is_shown_as_it_is() {
    for metrics in [
        "",
        "{\"step\":0}\n",
        "{\"step\":1,\"loss\":2.5}\n",
        "{\"step\":1,\"loss\":null}\n{\"step\":2,\"loss\":null}\n",
        "{\"step\":1,\"loss\":1e308}\n{\"step\":2,\"loss\":-1e308}\n",
        "{\"step\":18446744073709551615,\"loss\":0}\n",
        "{\"step\":1,\"../<b>\\u0000\":1,\"a/b\":2,\"\":3,\"text\":\"x\",\"list\":[1]}\n",
    ] {
        let dir = small_run(metrics);
        let text = page(dir.path());
        parse(&text);
        assert!(!text.contains("<b>") && !text.contains("\0"));
        for word in ["NaN", "inf,", "-0.0"] {
            let drawn = parse(&text).descendants().any(|e| {
                ["d", "x", "y", "cx", "cy"]
                    .iter()
                    .any(|a| e.attribute(*a).is_some_and(|d| d.contains(word)))
            });
            assert!(!drawn, "{metrics}: {word}");
        }
        let out = dir.path().join("svg");
        for path in report::write_svgs(&RunFiles::read(dir.path()).unwrap(), &out, SMOOTHING).unwrap() {
            assert_eq!(path.parent(), Some(out.as_path()));
            parse(&fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn a_run_that_failed_says_why() {
    let dir = small_run("{\"step\":1,\"loss\":2.5}\n");
    let record = RunRecord {
        status: Status::Failed,
        error: Some("step 7: loss is NaN (first seen in layers.3); lower the <learning rate>".into()),
        ..RunRecord::default()
    };
    record.write(&dir.path().join("run.json")).unwrap();
    let text = page(dir.path());
    assert!(text.contains("lower the &lt;learning rate&gt;") && text.contains("status failed"));
}

fn glmtune(args: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_glmtune"))
        .arg("report")
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn the_command_writes_what_it_says() {
    let dir = small_run("{\"step\":1,\"loss\":2.5}\n");
    let output = glmtune(&[dir.path()]);
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        printed.trim_end(),
        dir.path().join("report.html").to_str().unwrap()
    );

    let (file, svg) = (dir.path().join("other.html"), dir.path().join("curves"));
    let flags = [dir.path(), "--output".as_ref(), &file, "--svg".as_ref(), &svg];
    assert!(glmtune(&flags).status.success());
    assert!(file.is_file() && svg.join("loss.svg").is_file());
}

#[test]
fn what_is_no_run_is_refused_in_words() {
    let dir = small_run("{\"step\":1,\"loss\":2.5}\n");
    let inside = dir.path().join("checkpoints");
    fs::create_dir(&inside).unwrap();
    let empty = tempfile::tempdir().unwrap();
    let missing = empty.path().join("missing");
    let file = dir.path().join("run.json");
    for (path, expected) in [
        (inside.as_path(), "give the folder above it"),
        (
            empty.path(),
            "found no run.json in it, expected the folder of a run",
        ),
        (&missing, "found nothing, expected the folder of a run"),
        (
            &file,
            "found a file, expected the folder of a run; give the folder that holds run.json",
        ),
    ] {
        let output = glmtune(&[path]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(
            message.starts_with("error: ") && message.contains(expected),
            "{message}"
        );
        assert_eq!(message.lines().count(), 1, "{message}");
    }
    fs::write(
        dir.path().join("samples.jsonl"),
        "{\"step\":1}\n{\"step\":\n{\"step\":2}\n",
    )
    .unwrap();
    let message = String::from_utf8(glmtune(&[dir.path()]).stderr).unwrap();
    assert!(message.contains("samples.jsonl:2: found"), "{message}");
    assert!(!dir.path().join("report.html").exists());
    let smoothing = glmtune(&[dir.path(), "--smoothing".as_ref(), "1".as_ref()]);
    assert_eq!(smoothing.status.code(), Some(2));
}
