//! BLEU, ROUGE and the words under them, against nltk, rouge_chinese and jieba.

use std::path::{Path, PathBuf};

use glmtune::evaluate::text::{TextScores, cut, score};
use serde_json::Value;

use crate::common::{assert_close, golden};

/// The pairs of the golden set in use, and those of `make_metrics.py`, which are always there.
fn files() -> Vec<PathBuf> {
    let edges = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/metrics/edges.json");
    golden("metrics/bleu_rouge.json")
        .into_iter()
        .chain([edges])
        .collect()
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn words_are_those_of_jieba() {
    for path in files() {
        for pair in read(&path)["pairs"].as_array().unwrap() {
            for side in ["prediction", "reference"] {
                let words: Vec<Value> = cut(pair[side].as_str().unwrap())
                    .into_iter()
                    .map(Value::from)
                    .collect();
                let want = pair[format!("jieba_{side}")].as_array().unwrap();
                assert_eq!(&words, want, "{}", pair[side]);
            }
        }
    }
}

#[test]
fn scores_are_those_of_the_official_script() {
    for path in files() {
        let golden = read(&path);
        let mut all = Vec::new();
        for pair in golden["pairs"].as_array().unwrap() {
            let [prediction, reference] =
                ["prediction", "reference"].map(|side| pair[side].as_str().unwrap());
            let scores = score(prediction, reference);
            for (name, value) in scores.named() {
                // Both are rounded to 4 decimals: equal as numbers.
                let what = format!("{name} of {prediction:?} against {reference:?}");
                assert_close(
                    &what,
                    &[value],
                    &[pair["scores"][name].as_f64().unwrap()],
                    1e-9,
                    0.0,
                );
            }
            all.push(scores);
        }
        if let Some(mean) = golden.get("mean") {
            for (name, value) in TextScores::mean(all).unwrap().named() {
                assert_close(name, &[value], &[mean[name].as_f64().unwrap()], 1e-9, 0.0);
            }
        }
    }
}
