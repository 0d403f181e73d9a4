//! The turns so far, and the file that keeps them.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::cli::generation::first_question;
use crate::data::record::{Columns, Question, read_objects};
use crate::error::{Error, Result};

/// A conversation: a text before it, and questions with their answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    /// What stands before the first question; empty for nothing.
    ///
    /// ChatGLM-6B knows no role of a system. The text becomes the first line of the first question, `[Round 0]\n问：TEXT\nquestion`, which
    /// is as near as its format comes; when old turns have to go, it moves to the oldest that is left.
    pub system: String,
    /// Questions and answers.
    pub turns: Vec<(String, String)>,
}

impl Conversation {
    /// As JSON lines that `glmtune train` reads (it leaves out answers that are empty): a record for each answer, with the turns before it as its history. The text before
    /// the first question is part of it, as the model saw it; the field `system` only says where it ends.
    pub fn to_jsonl(&self) -> String {
        let mut turns = self.turns.clone();
        if let Some((question, _)) = turns.first_mut() {
            *question = first_question(&self.system, question);
        }
        let mut text = String::new();
        for (i, (question, answer)) in turns.iter().enumerate() {
            let mut record = Map::from_iter([
                ("prompt".to_string(), json!(question)),
                ("response".to_string(), json!(answer)),
                ("history".to_string(), json!(turns[..i])),
            ]);
            if !self.system.is_empty() {
                record.insert("system".to_string(), json!(self.system));
            }
            text += &Value::Object(record).to_string();
            text.push('\n');
        }
        text
    }

    /// The conversation of a file that [`Conversation::to_jsonl`] made: its last record holds all of it.
    ///
    /// # Errors
    /// The last record has no question, no answer or no turns before it.
    pub fn read(path: &Path) -> Result<Self> {
        let Some((line, record)) = read_objects(path)?.pop() else {
            return Err(Error::input(
                path.display(),
                "no records",
                "a conversation",
                "check the path",
            ));
        };
        let place = format!("{}:{line}", path.display());
        let column = |name: &str| Some(name.to_string());
        let columns = Columns {
            prompt: column("prompt"),
            response: column("response"),
            history: column("history"),
        };
        let question = Question::of(&record, &columns, &place)?;
        let Some(Value::String(answer)) = record.get("response") else {
            let remedy = "give a file that /save wrote";
            return Err(Error::input(place, "no response", "an answer", remedy));
        };
        let mut turns = question.history;
        turns.push((question.query, answer.clone()));
        let mut system = String::new();
        if let Some(Value::String(text)) = record.get("system")
            && let Some(rest) = turns[0].0.strip_prefix(&format!("{text}\n"))
        {
            (system, turns[0].0) = (text.clone(), rest.to_string());
        }
        Ok(Self { system, turns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::record::read_records;

    #[test]
    fn what_is_saved_is_loaded_and_is_data_to_train_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("talk.jsonl");
        let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
        let conversation = Conversation {
            system: "你是医生。\n请简短".into(),
            turns: vec![pair("头痛\n怎么办", "多休息"), pair("还有呢", "多喝水")],
        };
        std::fs::write(&path, conversation.to_jsonl()).unwrap();
        assert_eq!(Conversation::read(&path).unwrap(), conversation);
        let (records, _) = read_records(&path, &Columns::default()).unwrap();
        assert_eq!(records.len(), 2);
        assert_eq!(records[0].prompt, "你是医生。\n请简短\n头痛\n怎么办");
        assert_eq!(
            records[1].history,
            [pair("你是医生。\n请简短\n头痛\n怎么办", "多休息")]
        );
        assert_eq!(
            (records[1].prompt.as_str(), records[1].response.as_str()),
            ("还有呢", "多喝水")
        );

        let mut plain = Conversation {
            system: String::new(),
            ..conversation
        };
        plain.turns.push(pair("再见", ""));
        std::fs::write(&path, plain.to_jsonl()).unwrap();
        assert_eq!(Conversation::read(&path).unwrap(), plain);
        assert!(!plain.to_jsonl().contains("system"));
        std::fs::write(&path, "{\"a\": 1}\n").unwrap();
        assert!(Conversation::read(&path).is_err());
    }
}
