//! Learning-rate schedules against the table made with transformers.

use glmtune::schedule::{Schedule, Scheduler};

use crate::common::{assert_close, golden};

#[test]
fn learning_rates_are_those_of_transformers() {
    let Some(path) = golden("chatglm_v1/trajectories/lr_schedules.json") else {
        return;
    };
    let table: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let base = table["base_lr"].as_f64().unwrap();
    let mut checked = 0;
    for (key, rates) in table["lr_of_step"].as_object().unwrap() {
        // "cosine/warmup3/total20"
        let parts: Vec<&str> = key.split('/').collect();
        let scheduler = Scheduler::ALL
            .into_iter()
            .find(|s| s.name() == parts[0])
            .unwrap_or_else(|| panic!("{key}: a schedule that glmtune does not have"));
        let number = |part: &str, prefix: &str| part.strip_prefix(prefix).unwrap().parse::<u64>().unwrap();
        let schedule = Schedule {
            scheduler,
            base,
            warmup_steps: number(parts[1], "warmup"),
            total_steps: number(parts[2], "total"),
            ..Schedule::default()
        };
        let want: Vec<f64> = rates
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r.as_f64().unwrap())
            .collect();
        let got: Vec<f64> = (0..want.len() as u64)
            .map(|update| schedule.rate(update))
            .collect();
        assert_close(key, &got, &want, 1e-18, 1e-9);
        checked += 1;
    }
    assert!(checked >= 6, "only {checked} schedules in the table");
}

/// Made by `tests/goldens/make_schedules.py` with transformers' own functions.
#[test]
fn every_schedule_is_that_of_transformers() {
    let table: serde_json::Value =
        serde_json::from_str(include_str!("../goldens/learning_rates.json")).unwrap();
    let base = table["base"].as_f64().unwrap();
    let cases = table["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 33);
    for case in cases {
        let number = |key: &str| case[key].as_f64();
        let schedule = Schedule {
            scheduler: serde_json::from_value(case["scheduler"].clone()).unwrap(),
            base,
            warmup_steps: case["warmup"].as_u64().unwrap(),
            total_steps: case["total"].as_u64().unwrap(),
            min_lr_ratio: number("min_lr_rate")
                .or(number("lr_end").map(|end| end / base))
                .unwrap_or(0.0),
            power: number("power").unwrap_or(1.0),
        };
        let rates = case["rates"].as_array().unwrap().iter();
        let want: Vec<f64> = rates.map(|r| r.as_f64().unwrap()).collect();
        let got: Vec<f64> = (0..want.len() as u64)
            .map(|update| schedule.rate(update))
            .collect();
        assert_close(&format!("{schedule:?}"), &got, &want, 1e-18, 1e-12);
    }
}
