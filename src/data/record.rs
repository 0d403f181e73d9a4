//! Records: questions, answers and earlier turns, from JSON arrays and JSON lines of several shapes.

use std::fmt::Display;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Earlier turns of a conversation: question and answer of each.
pub type History = Vec<(String, String)>;

/// One supervised example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The question.
    pub prompt: String,
    /// The answer, never empty.
    pub response: String,
    /// The turns before, oldest first.
    pub history: History,
    /// `file:line`, for messages.
    pub place: String,
}

/// The names of the columns; what is `None` is detected from the first record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Columns {
    /// `--prompt-column`
    pub prompt: Option<String>,
    /// `--response-column`
    pub response: Option<String>,
    /// `--history-column`
    pub history: Option<String>,
}

/// A shape of records that is recognised by its keys.
struct Shape {
    name: &'static str,
    /// What the question is made of, joined by a newline; the first must be there, the others may be missing or empty.
    prompt: &'static [&'static str],
    response: &'static str,
}

/// In the order in which they are tried.
const SHAPES: [Shape; 7] = [
    Shape {
        name: "alpaca",
        prompt: &["instruction", "input"],
        response: "output",
    },
    Shape {
        name: "prompt/response",
        prompt: &["prompt"],
        response: "response",
    },
    Shape {
        name: "AdvertiseGen",
        prompt: &["content"],
        response: "summary",
    },
    Shape {
        name: "context/target",
        prompt: &["context"],
        response: "target",
    },
    Shape {
        name: "q/a",
        prompt: &["q"],
        response: "a",
    },
    Shape {
        name: "question/answer",
        prompt: &["question"],
        response: "answer",
    },
    Shape {
        name: "input/output",
        prompt: &["input"],
        response: "output",
    },
];
const HISTORY: &str = "history";
const NAME_COLUMNS: &str = "name them with --prompt-column and --response-column";

/// The columns in use.
struct Fields<'a> {
    shape: &'static str,
    prompt: Vec<&'a str>,
    response: &'a str,
    history: &'a str,
    /// Must every record have the history column? (When it was named.)
    history_required: bool,
}

impl Columns {
    /// The columns of a file whose first record is `first`. Without `answered` the answer may be missing.
    fn fields(&self, first: &Map<String, Value>, answered: bool, place: &dyn Display) -> Result<Fields<'_>> {
        let shape = SHAPES.iter().find(|shape| {
            self.prompt
                .as_deref()
                .is_none_or(|column| shape.prompt == [column])
                && self
                    .response
                    .as_deref()
                    .is_none_or(|column| shape.response == column)
                && first.contains_key(shape.prompt[0])
                && (!answered || first.contains_key(shape.response))
        });
        let (name, prompt, response) = match (&self.prompt, &self.response, shape) {
            (Some(prompt), Some(response), _) => ("named columns", vec![prompt.as_str()], response.as_str()),
            (Some(prompt), None, None) if !answered => ("named columns", vec![prompt.as_str()], ""),
            (_, _, Some(shape)) => (shape.name, shape.prompt.to_vec(), shape.response),
            (_, _, None) => {
                let keys = first.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                let known = SHAPES
                    .iter()
                    .map(|s| format!("{} -> {}", s.prompt.join(" + "), s.response));
                let expected = format!("one of {}", known.collect::<Vec<_>>().join("; "));
                let found = if keys.is_empty() {
                    "no columns".to_string()
                } else {
                    format!("columns {keys}")
                };
                return Err(Error::input(place, found, expected, NAME_COLUMNS));
            }
        };
        Ok(Fields {
            shape: name,
            prompt,
            response,
            history: self.history.as_deref().unwrap_or(HISTORY),
            history_required: self.history.is_some(),
        })
    }
}

impl Fields<'_> {
    /// One line that says what was detected, and which columns of `first` are not used.
    fn describe(&self, first: &Map<String, Value>) -> String {
        let used = |key: &str| self.prompt.contains(&key) || key == self.response || key == self.history;
        let unused: Vec<&str> = first
            .keys()
            .map(String::as_str)
            .filter(|key| !used(key))
            .collect();
        let prompt: Vec<&str> = self
            .prompt
            .iter()
            .copied()
            .filter(|column| first.contains_key(*column))
            .collect();
        let mut line = format!(
            "{}: question from {}, answer from {}",
            self.shape,
            prompt.join(" + "),
            self.response
        );
        if first.contains_key(self.history) {
            line += &format!(", earlier turns from {}", self.history);
        }
        if !unused.is_empty() {
            line += &format!("; not used: {}", unused.join(", "));
        }
        line
    }

    fn question(&self, record: &Map<String, Value>, place: &dyn Display) -> Result<Question> {
        let mut parts = Vec::with_capacity(self.prompt.len());
        for (i, column) in self.prompt.iter().enumerate() {
            let text = text(record, column, i == 0, place)?.unwrap_or_default();
            if !text.is_empty() {
                parts.push(text);
            }
        }
        let query = parts.join("\n");
        if query.is_empty() {
            let found = format!("an empty question in {}", self.prompt.join(" + "));
            return Err(Error::input(
                place,
                found,
                "text",
                "fill it in or remove the record",
            ));
        }
        let history = match record.get(self.history) {
            None if self.history_required => return Err(missing(record, self.history, place)),
            None | Some(Value::Null) => Vec::new(),
            Some(value) => turns(value).ok_or_else(|| {
                let found = format!("{} in {}", kind(value), self.history);
                Error::input(
                    place,
                    found,
                    "a list of [question, answer] pairs of text",
                    "mend the record",
                )
            })?,
        };
        Ok(Question { query, history })
    }

    /// The answer, `None` if it is empty.
    fn answer<'r>(&self, record: &'r Map<String, Value>, place: &dyn Display) -> Result<Option<&'r str>> {
        let answer = text(record, self.response, true, place)?;
        Ok(answer.filter(|answer| !answer.trim().is_empty()))
    }
}

/// A question and what came before it: a record whose answer does not matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The question.
    pub query: String,
    /// The turns before, oldest first.
    pub history: History,
}

impl Question {
    /// The question of one record; `place` names it in errors.
    pub fn of(record: &Map<String, Value>, columns: &Columns, place: &str) -> Result<Self> {
        columns.fields(record, false, &place)?.question(record, &place)
    }
}

/// Reads every record of a JSON array or a file of JSON lines, and says in one line which shape they have. A record
/// whose answer is empty teaches nothing: it is left out, as by the official code, and the line says so.
///
/// # Errors
/// No records, no UTF-8, no JSON, unknown columns, a record without question or answer column, columns of another type:
/// each with the line; no answers at all.
pub fn read_records(path: &Path, columns: &Columns) -> Result<(Vec<Record>, String)> {
    let objects = read_objects(path)?;
    let place = |line: usize| format!("{}:{line}", path.display());
    let Some((line, first)) = objects.first() else {
        return Err(Error::input(
            path.display(),
            "no records",
            "at least one",
            "check --data",
        ));
    };
    let fields = columns.fields(first, true, &place(*line))?;
    let mut records = Vec::with_capacity(objects.len());
    let mut unanswered = Vec::new();
    for (line, object) in &objects {
        let place = place(*line);
        let Some(response) = fields.answer(object, &place)? else {
            unanswered.push(place);
            continue;
        };
        let Question { query, history } = fields.question(object, &place)?;
        records.push(Record {
            prompt: query,
            response: response.to_string(),
            history,
            place,
        });
    }
    if records.is_empty() {
        let found = format!("no answer in {} (nor in any other record)", fields.response);
        return Err(Error::input(
            &unanswered[0],
            found,
            "text",
            "name the right column with --response-column",
        ));
    }
    let mut description = fields.describe(first);
    if !unanswered.is_empty() {
        let (count, all) = (unanswered.len(), objects.len());
        unanswered.truncate(3);
        let more = if count > 3 { ", ..." } else { "" };
        let places = unanswered.join(", ");
        description += &format!("; {count} of {all} records have no answer and are left out: {places}{more}");
    }
    Ok((records, description))
}

/// Reads every object of a JSON array or a file of JSON lines (told apart by the first character), each with the line
/// it starts on; blank lines and a byte-order mark are skipped.
pub fn read_objects(path: &Path) -> Result<Vec<(usize, Map<String, Value>)>> {
    let bytes = std::fs::read(path).map_err(Error::io(path, "open"))?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + newlines(&bytes[..error.valid_up_to()]);
        let found = format!("the byte 0x{:02x}", bytes[error.valid_up_to()]);
        Error::input(
            format!("{}:{line}", path.display()),
            found,
            "UTF-8",
            "convert the file (iconv -f gb18030 -t utf-8)",
        )
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        return Err(Error::input(
            path.display(),
            "an empty file",
            "JSON records",
            "check the path",
        ));
    }
    if text.trim_start().starts_with('[') {
        read_array(text, path)
    } else {
        read_lines(text, path)
    }
}

const SHAPE_OF_FILE: &str = "one JSON array of objects, or one JSON object a line";

fn object(value: Value, line: usize, path: &Path) -> Result<(usize, Map<String, Value>)> {
    match value {
        Value::Object(map) => Ok((line, map)),
        other => Err(broken(path, line, kind(&other))),
    }
}

/// What the JSON reader says, without its own line number: it counts from where it began to read.
fn no_json(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or_default();
    format!("no JSON ({what}, column {})", error.column())
}

fn broken(path: &Path, line: usize, found: impl Display) -> Error {
    Error::input(
        format!("{}:{line}", path.display()),
        found,
        SHAPE_OF_FILE,
        "mend the line",
    )
}

fn read_lines(text: &str, path: &Path) -> Result<Vec<(usize, Map<String, Value>)>> {
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let value = serde_json::from_str(line).map_err(|error| broken(path, i + 1, no_json(&error)))?;
            object(value, i + 1, path)
        })
        .collect()
}

/// Element by element, so that each has its line.
fn read_array(text: &str, path: &Path) -> Result<Vec<(usize, Map<String, Value>)>> {
    let mut objects = Vec::new();
    let (mut at, mut line) = (text.find('[').map_or(0, |i| i + 1), 1);
    line += newlines(&text.as_bytes()[..at]);
    let skip_space = |at: &mut usize, line: &mut usize| {
        let rest = &text[*at..];
        let length = rest.len() - rest.trim_start().len();
        *line += newlines(&rest.as_bytes()[..length]);
        *at += length;
        text.as_bytes().get(*at).copied()
    };
    let mut next = skip_space(&mut at, &mut line);
    while next != Some(b']') || !objects.is_empty() {
        let mut stream = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Value>();
        let value = match stream.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => return Err(broken(path, line + error.line().max(1) - 1, no_json(&error))),
            None => return Err(broken(path, line, "the end of the file inside the array")),
        };
        let length = stream.byte_offset();
        objects.push(object(value, line, path)?);
        line += newlines(&text.as_bytes()[at..at + length]);
        at += length;
        next = skip_space(&mut at, &mut line);
        match next {
            Some(b',') => {
                at += 1;
                skip_space(&mut at, &mut line);
            }
            Some(b']') => break,
            Some(_) => {
                return Err(broken(
                    path,
                    line,
                    "something else than a comma between two elements",
                ));
            }
            None => return Err(broken(path, line, "the end of the file inside the array")),
        }
    }
    at += 1;
    if skip_space(&mut at, &mut line).is_some() {
        return Err(broken(path, line, "text after the array"));
    }
    Ok(objects)
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte == b'\n').count()
}

/// The text of a column. `None`: there is no such column (unless it is `required`) or it is null.
fn text<'r>(
    record: &'r Map<String, Value>,
    column: &str,
    required: bool,
    place: &dyn Display,
) -> Result<Option<&'r str>> {
    match record.get(column) {
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Null) => Ok(None),
        Some(other) => {
            let found = format!("{} in {column}", kind(other));
            Err(Error::input(
                place,
                found,
                "text",
                "mend the record, or name another column",
            ))
        }
        None if required => Err(missing(record, column, place)),
        None => Ok(None),
    }
}

fn missing(record: &Map<String, Value>, column: &str, place: &dyn Display) -> Error {
    let keys = record.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    Error::input(
        place,
        format!("columns {keys}"),
        format!("a column {column}"),
        "mend or remove the record",
    )
}

/// `[[question, answer], ...]`.
fn turns(value: &Value) -> Option<History> {
    let turn = |turn: &Value| match turn.as_array()?.as_slice() {
        [Value::String(question), Value::String(answer)] => Some((question.clone(), answer.clone())),
        _ => None,
    };
    value.as_array()?.iter().map(turn).collect()
}

/// A JSON value in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
