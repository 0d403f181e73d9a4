//! What is asked: records of JSON, or lines of plain text.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::data::record::{Columns, Question, read_objects};
use crate::error::{Error, Result};
use crate::train::bytes_fingerprint;

/// A record of the input: all its fields, and what of them is asked.
#[derive(Debug)]
pub struct Item {
    /// `file:line`, for messages.
    pub place: String,
    /// The line it starts on.
    pub line: usize,
    /// All its fields, in their order.
    pub fields: Map<String, Value>,
    /// The question.
    pub query: String,
    /// The turns before it.
    pub history: Vec<(String, String)>,
}

/// Reads the questions of a file: a prompt a line if its name ends in `.txt`, else records of JSON or JSONL, whose answers may be
/// missing.
///
/// # Errors
/// What is wrong with a line, with its number; no question at all.
pub fn read(input: &Path, columns: &Columns) -> Result<Vec<Item>> {
    let plain = input
        .extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("txt"));
    let items = if plain {
        lines(input)?
    } else {
        records(input, columns)?
    };
    if items.is_empty() {
        return Err(Error::input(
            input.display(),
            "no records",
            "at least one",
            "check --input",
        ));
    }
    Ok(items)
}

/// What tells two inputs apart: every record with its line. It is of what was read, for a pipe can be read only once.
pub fn fingerprint(items: &[Item]) -> String {
    bytes_fingerprint(|hash| {
        for Item { line, fields, .. } in items {
            hash(json!([line, fields]).to_string().as_bytes());
            hash(b"\n");
        }
    })
}

fn records(input: &Path, columns: &Columns) -> Result<Vec<Item>> {
    let item = |(line, fields): (usize, Map<String, Value>)| {
        let place = format!("{}:{line}", input.display());
        let Question { query, history } = Question::of(&fields, columns, &place)?;
        Ok(Item {
            place,
            line,
            fields,
            query,
            history,
        })
    };
    read_objects(input)?.into_iter().map(item).collect()
}

/// Every line that is not blank, as a record with the one field `prompt`.
fn lines(input: &Path) -> Result<Vec<Item>> {
    let bytes = std::fs::read(input).map_err(Error::io(input, "open"))?;
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes);
    let mut items = Vec::new();
    for (line, bytes) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
        let place = format!("{}:{line}", input.display());
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let found = format!("the byte 0x{:02x}", bytes[error.valid_up_to()]);
            let remedy = "convert the file (iconv -f gb18030 -t utf-8)";
            Error::input(&place, found, "UTF-8", remedy)
        })?;
        let query = text.trim();
        if query.is_empty() {
            continue;
        }
        if query.starts_with('{') && serde_json::from_str::<Map<String, Value>>(query).is_ok() {
            let remedy = "name the file .jsonl to have its records read";
            return Err(Error::input(
                &place,
                "a record of JSON",
                "a prompt of plain text, as in every .txt",
                remedy,
            ));
        }
        items.push(Item {
            place,
            line,
            fields: Map::from_iter([("prompt".to_string(), query.into())]),
            query: query.to_string(),
            history: Vec::new(),
        });
    }
    Ok(items)
}

/// The line of an answer: the fields of its record in their order, then `sample` if there may be several, then `predict`.
pub fn line(item: &Item, sample: Option<u64>, answer: &str) -> String {
    let mut fields = item.fields.clone();
    fields.shift_remove("predict");
    if let Some(sample) = sample {
        fields.shift_remove("sample");
        fields.insert("sample".to_string(), sample.into());
    }
    fields.insert("predict".to_string(), answer.into());
    Value::Object(fields).to_string() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_keeps_the_fields_of_its_record_and_adds_the_answer() {
        let Value::Object(fields) = serde_json::json!({"z": 1, "predict": "old", "response": "标"}) else {
            unreachable!()
        };
        let item = Item {
            place: String::new(),
            line: 1,
            fields,
            query: String::new(),
            history: Vec::new(),
        };
        let of = |sample| line(&item, sample, "答\n案");
        assert_eq!(
            of(None),
            "{\"z\":1,\"response\":\"标\",\"predict\":\"答\\n案\"}\n"
        );
        assert_eq!(
            of(Some(2)),
            "{\"z\":1,\"response\":\"标\",\"sample\":2,\"predict\":\"答\\n案\"}\n"
        );
    }

    #[test]
    fn plain_text_is_a_prompt_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let read_text = |bytes: &[u8]| {
            let path = dir.path().join("prompts.TXT");
            std::fs::write(&path, bytes).unwrap();
            read(&path, &Columns::default())
        };
        let items = read_text("\u{feff}你好\r\n\n [1] + {2}\n".as_bytes()).unwrap();
        let asked: Vec<_> = items
            .iter()
            .map(|item| (item.line, item.query.as_str()))
            .collect();
        assert_eq!(asked, [(1, "你好"), (3, "[1] + {2}")]);
        assert!(
            read_text(b"\n \n")
                .unwrap_err()
                .to_string()
                .contains("no records")
        );
        let line = read_text(b"a\n{\"prompt\": \"b\"}\n").unwrap_err().to_string();
        assert!(
            line.contains(":2: found a record of JSON") && line.contains(".jsonl"),
            "{line}"
        );
        let line = read_text(b"a\n\xff\n").unwrap_err().to_string();
        assert!(line.contains(":2: found the byte 0xff"), "{line}");
    }
}
