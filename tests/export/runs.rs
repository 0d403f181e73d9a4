//! `glmtune export` from outside.

use std::path::Path;
use std::process::Output;

use glmtune::checkpoint::ggml::GgmlFile;
use glmtune::checkpoint::{Checkpoint, Source, write_safetensors};
use glmtune::rng::Stream;
use glmtune::tensor::Tensor;

use super::listing;
use crate::common::{relative_l2, values};
use crate::program::{Workplace, fails, glmtune, str, succeeds, text};

const QKV: &str = "transformer.layers.1.attention.query_key_value";

/// A LoRA adapter of one linear of tiny-glm with large factors, written by hand.
fn adapter(place: &Workplace) -> (std::path::PathBuf, Vec<f32>) {
    let dir = place.path("adapter");
    std::fs::create_dir_all(&dir).unwrap();
    let stream = Stream::new(9, 9);
    let random = |from: u64, n: u64| {
        (from..from + n)
            .map(|i| 0.3 * stream.normal(i))
            .collect::<Vec<f32>>()
    };
    let (a, b) = (random(0, 2 * 128), random(1000, 384 * 2));
    let tensors = [
        (
            format!("base_model.model.{QKV}.lora_A.weight"),
            Tensor::from_slice(&a, [2, 128]),
        ),
        (
            format!("base_model.model.{QKV}.lora_B.weight"),
            Tensor::from_slice(&b, [384, 2]),
        ),
    ];
    let named: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    write_safetensors(
        &dir.join("adapter_model.safetensors"),
        &named,
        &Default::default(),
    )
    .unwrap();
    let config = serde_json::json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0,
        "target_modules": ["query_key_value"], "layers_to_transform": [1], "fan_in_fan_out": false, "bias": "none",
    });
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    // s B A with s = 4 / 2.
    let product = (0..384 * 128)
        .map(|i| {
            (0..2)
                .map(|k| 2.0 * b[i / 128 * 2 + k] * a[k * 128 + i % 128])
                .sum()
        })
        .collect();
    (dir, product)
}

fn export(place: &Workplace, format: &str, output: &Path, more: &[&str]) -> Output {
    let model = place.model();
    let mut args = vec![
        "export",
        "--model",
        str(&model),
        "--format",
        format,
        "--output",
        str(output),
    ];
    args.extend(more);
    if !more.contains(&"--no-verify") && !more.contains(&"--verify-prompts") {
        args.extend(["--verify-prompts", "2"]);
    }
    glmtune(&args).output().unwrap()
}

#[test]
fn every_format_is_written_compared_and_described() {
    let Some(place) = Workplace::new() else { return };
    for (format, kind) in [
        ("ggml", Some("f32")),
        ("ggml", Some("f16")),
        ("ggml", Some("q8_0")),
        ("ggml", None),
        ("bnb", None),
        ("bnb", Some("fp4")),
        ("thudm-int8", None),
        ("thudm-int4", None),
    ] {
        let output = place.path(&format!("{format}-{}", kind.unwrap_or("default")));
        let more: Vec<&str> = kind.iter().flat_map(|kind| ["--type", kind]).collect();
        let done = export(&place, format, &output, &more);
        succeeds(&done);
        let table = text(&done.stdout);
        assert!(
            table.contains("largest logit difference") && table.contains("written ("),
            "{table}"
        );
        let card = match format {
            "ggml" => output.with_extension("md"),
            _ => output.join("README.md"),
        };
        let card = std::fs::read_to_string(&card).unwrap_or_else(|_| {
            let mut name = output.clone().into_os_string();
            name.push(".md");
            std::fs::read_to_string(name).unwrap()
        });
        assert!(
            card.contains("## Verification") && card.contains("largest logit difference"),
            "{card}"
        );
        match format {
            "ggml" => drop(GgmlFile::open(&output).unwrap()),
            _ => Checkpoint::open(&output).unwrap().validate().unwrap(),
        }
        // Not written over, but for --overwrite.
        let line = fails(&export(&place, format, &output, &more), 1);
        assert!(line.contains("--overwrite"), "{line}");
        let mut again = more.clone();
        again.extend(["--overwrite", "--no-verify"]);
        let done = export(&place, format, &output, &again);
        succeeds(&done);
        assert!(!text(&done.stdout).contains("largest logit difference"));
    }
    let left = listing(&place.path(""));
    assert!(left.iter().all(|name| !name.starts_with('.')), "{left:?}");
}

#[test]
fn adapters_are_in_what_is_exported() {
    let Some(place) = Workplace::new() else { return };
    let (dir, product) = adapter(&place);
    let base = Checkpoint::open(&place.model()).unwrap();
    let name = format!("{QKV}.weight");
    let original = values(&base.tensor(&name).unwrap());
    for factor in [1.0, -0.5] {
        let want: Vec<f64> = original
            .iter()
            .zip(&product)
            .map(|(w, p)| w + factor * f64::from(*p))
            .collect();
        let factor = factor.to_string();
        let output = place.path("merged.bin");
        let more = [
            "--adapter",
            str(&dir),
            "--adapter-scale",
            &factor,
            "--type",
            "f32",
            "--overwrite",
        ];
        succeeds(&export(&place, "ggml", &output, &more));
        let written = GgmlFile::open(&output).unwrap();
        let apart = relative_l2(&values(&written.dense(&name).unwrap()), &want);
        assert!(apart < 1e-6, "{apart}");
        let other = "transformer.layers.0.attention.query_key_value.weight";
        let (got, kept) = (written.dense(other).unwrap(), base.tensor(other).unwrap());
        assert_eq!(values(&got), values(&kept));

        for (format, allowed) in [("thudm-int8", 0.01), ("bnb", 0.15), ("thudm-int4", 0.25)] {
            let output = place.path(format);
            let more = ["--adapter", str(&dir), "--adapter-scale", &factor, "--overwrite"];
            succeeds(&export(&place, format, &output, &more));
            let written = Checkpoint::open(&output).unwrap();
            let apart = relative_l2(&values(&Source::dense(&written, &name).unwrap()), &want);
            assert!(apart < allowed && apart > 1e-5, "{format}: {apart}");
        }
    }
    let output = place.path("peft");
    let done = export(
        &place,
        "peft",
        &output,
        &["--adapter", str(&dir), "--adapter-scale", "0.5"],
    );
    succeeds(&done);
    assert!(text(&done.stdout).contains("largest logit difference"));
    assert!(output.join("adapter_config.json").exists());
    // It goes into nothing: --into changes neither it nor what it is compared on.
    let more = ["--adapter", str(&dir), "--into", "original", "--overwrite"];
    let done = export(&place, "peft", &output, &more);
    succeeds(&done);
    assert!(!text(&done.stdout).contains("another base"));
}

/// An adapter that moves logits less than four bits may: a file without it is within the bound and refused.
#[test]
fn a_file_without_the_adapter_is_refused() {
    let Some(place) = Workplace::new() else { return };
    let (dir, _) = adapter(&place);
    let (with, without) = (place.path("with.bin"), place.path("without.bin"));
    let model = place.model();
    let adapted = ["--adapter", str(&dir), "--adapter-scale", "0.5"];
    succeeds(&export(&place, "ggml", &without, &["--no-verify"]));
    let done = export(&place, "ggml", &with, &adapted);
    succeeds(&done);
    let kept = |table: &str| table.contains("adapters' effect kept");
    assert!(kept(&text(&done.stdout)), "{}", text(&done.stdout));
    let card = std::fs::read_to_string(place.path("with.bin.md")).unwrap();
    assert!(kept(&card), "{card}");
    let verify = |file: &Path, more: &[&str]| {
        let base = [
            "verify",
            str(file),
            "--model",
            str(&model),
            "--verify-prompts",
            "4",
        ];
        glmtune(&[&base, more].concat()).output().unwrap()
    };
    succeeds(&verify(&with, &adapted));
    let line = fails(&verify(&without, &adapted), 1);
    assert!(
        line.contains("of what the adapters do to the logits") && line.contains("write it again"),
        "{line}"
    );
    let done = verify(&without, &["--adapter", str(&dir), "--adapter-scale", "0"]);
    succeeds(&done);
    assert!(text(&done.stdout).contains("the adapters move no logit"));
    let done = verify(&without, &[]);
    succeeds(&done);
    assert!(!kept(&text(&done.stdout)));
}

#[test]
fn a_result_beyond_the_bound_never_gets_its_name() {
    let Some(place) = Workplace::new() else { return };
    for (format, name) in [("ggml", "model.bin"), ("bnb", "folder"), ("thudm-int4", "other")] {
        let output = place.path(name);
        let line = fails(&export(&place, format, &output, &["--verify-bound", "0.001"]), 1);
        assert!(
            line.contains("--verify-bound") && line.contains("logits up to"),
            "{line}"
        );
        assert!(!output.exists());
    }
    assert_eq!(listing(&place.path("")), ["data.json", "model"]);
}

#[test]
fn what_cannot_be_exported_is_refused_with_the_reason() {
    let Some(place) = Workplace::new() else { return };
    let output = place.path("out");
    let line = fails(&export(&place, "gguf", &output, &[]), 2);
    assert!(
        line.contains("no program reads") && line.contains("ggml"),
        "{line}"
    );
    for (format, more, what) in [
        ("ggml", vec!["--type", "nf4"], "expected one of f32"),
        ("bnb", vec!["--type", "q4_0"], "expected one of nf4, fp4"),
        ("thudm-int4", vec!["--type", "q4_0"], "only ggml and bnb"),
        ("ggml", vec!["--no-double-quant"], "--format bnb"),
        ("ggml", vec!["--into", "requantized"], "requantized"),
        ("peft", vec![], "at least one"),
        (
            "bnb",
            vec!["--into", "dequantized", "--type", "fp4"],
            "expected original: leave --into out",
        ),
    ] {
        let line = fails(&export(&place, format, &output, &more), 2);
        assert!(line.contains(what), "{line}");
    }
    // A P-Tuning prefix, which is no change of weights.
    let prefix = place.path("prefix");
    std::fs::create_dir(&prefix).unwrap();
    let table = Tensor::from_slice(&vec![0.1f32; 4 * 4 * 2 * 128], [4, 4 * 2 * 128]);
    let named = [("transformer.prefix_encoder.embedding.weight".to_string(), &table)];
    glmtune::checkpoint::write_torch_bin(&prefix.join("pytorch_model.bin"), &named).unwrap();
    for (format, what) in [
        ("ggml", "chatglm.cpp reads no keys and values"),
        ("bnb", "no weight that it could"),
    ] {
        let line = fails(&export(&place, format, &output, &["--adapter", str(&prefix)]), 1);
        assert!(line.contains(what) && line.contains("P-Tuning"), "{line}");
    }
    // What lies there already.
    std::fs::create_dir(place.path("folder")).unwrap();
    let line = fails(&export(&place, "ggml", &place.path("folder"), &[]), 1);
    assert!(line.contains("a folder"), "{line}");
    let line = fails(&export(&place, "ggml", &place.data(), &["--overwrite"]), 1);
    assert!(line.contains("another file than one of GGML"), "{line}");
    let line = fails(&export(&place, "bnb", &place.model(), &["--overwrite"]), 1);
    assert!(line.contains("the base model itself"), "{line}");
    assert!(!output.exists());
}

#[test]
fn a_base_in_four_bits_keeps_them_or_is_decoded() {
    let Some(place) = Workplace::new() else { return };
    let (first, second) = (place.path("first"), place.path("second"));
    succeeds(&export(&place, "bnb", &first, &["--type", "fp4", "--no-verify"]));
    let run = |output: &Path, format: &str| {
        let args = [
            "export",
            "--model",
            str(&first),
            "--format",
            format,
            "--output",
            str(output),
        ];
        glmtune(&args).args(["--verify-prompts", "2"]).output().unwrap()
    };
    let done = run(&second, "bnb");
    let said = succeeds(&done);
    assert!(!said.contains("a second time"), "{said}");
    assert!(text(&done.stdout).contains("the same weights"));
    let file = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(file(&first) == file(&second), "nothing is rounded twice");
    let done = run(&place.path("model.bin"), "ggml");
    assert!(succeeds(&done).contains("a second time"));
}
