//! Where turns come from: a terminal, with its line editor, or a pipe. The only door to `rustyline`.

use std::cell::Cell;
use std::io::{BufRead, ErrorKind};
use std::path::{Path, PathBuf};

use rustyline::completion::{Completer, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{CompletionType, Config, Context, Helper};

use super::command::{COMMANDS, PARAMS};
use crate::error::{Error, Result};

/// What came in.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// A question or command, perhaps of several lines.
    Text(String),
    /// Ctrl-C, at an empty prompt or in a line, which is dropped.
    Interrupted {
        /// Was there nothing to drop?
        empty: bool,
    },
    /// The end.
    End,
}

/// A source of turns.
pub trait Input {
    /// The next one.
    ///
    /// # Errors
    /// It cannot be read, or is no UTF-8.
    fn next(&mut self) -> Result<Line>;

    /// Is a person typing? Then what goes wrong is said, and the conversation goes on.
    fn is_terminal(&self) -> bool;
}

/// One turn a line, of a pipe or a file.
pub struct Pipe<R> {
    reader: R,
    number: usize,
}

impl<R: BufRead> Pipe<R> {
    /// Reads `reader` from its first line on.
    pub fn new(reader: R) -> Self {
        Self { reader, number: 0 }
    }
}

impl<R: BufRead> Input for Pipe<R> {
    fn next(&mut self) -> Result<Line> {
        let mut line = Vec::new();
        self.number += 1;
        let read = self.reader.read_until(b'\n', &mut line);
        if read.map_err(Error::io("standard input", "read"))? == 0 {
            return Ok(Line::End);
        }
        String::from_utf8(line).map(Line::Text).map_err(|e| {
            Error::input(
                format!("standard input:{}", self.number),
                format!("byte {:#04x}", e.as_bytes()[e.utf8_error().valid_up_to()]),
                "UTF-8 text",
                "convert the input to UTF-8",
            )
        })
    }

    fn is_terminal(&self) -> bool {
        false
    }
}

/// A terminal.
pub struct Editor {
    editor: rustyline::Editor<Typing, FileHistory>,
    /// Where lines are kept for the next time; `None`: they are not.
    history: Option<PathBuf>,
}

/// How many lines are kept.
const HISTORY: usize = 1000;

impl Editor {
    /// With the lines that the file `history` keeps.
    ///
    /// # Errors
    /// The terminal cannot be used.
    pub fn new(history: Option<PathBuf>) -> Result<Self> {
        let config = Config::builder()
            .max_history_size(HISTORY)
            .map_err(unusable)?
            .completion_type(CompletionType::List)
            .history_ignore_space(true)
            .build();
        let mut editor = rustyline::Editor::with_config(config).map_err(unusable)?;
        editor.set_helper(Some(Typing {
            empty: Cell::new(true),
        }));
        let history = history.filter(|path| {
            let folder = path.parent().unwrap_or(Path::new("."));
            let there = std::fs::create_dir_all(folder).and_then(|()| match path.exists() {
                true => std::fs::OpenOptions::new().append(true).open(path).map(drop),
                false => Ok(()),
            });
            if let Err(error) = &there {
                eprintln!(
                    "(lines are not kept for the next time: {}: {error})",
                    path.display()
                );
            }
            if there.is_ok() && path.exists() && editor.load_history(path).is_err() {
                let _ = editor.clear_history();
                set_aside(path);
            }
            there.is_ok()
        });
        Ok(Self { editor, history })
    }

    fn keep(&mut self, line: &str) {
        // Neither a full disk nor a folder that has gone is a reason to stop talking.
        let _ = self.editor.add_history_entry(line);
        if let Some(path) = &self.history
            && let Err(error) = self.editor.append_history(path)
        {
            eprintln!(
                "(lines are no longer kept for the next time: {}: {error})",
                path.display()
            );
            self.history = None;
        }
    }
}

/// Moves a damaged file of lines out of the way, and says where to.
fn set_aside(path: &Path) {
    let names = (1..).map(|number| path.with_extension(format!("damaged{number}")));
    let Some(aside) = names.into_iter().find(|name| !name.exists()) else {
        return;
    };
    match std::fs::rename(path, &aside) {
        Ok(()) => eprintln!(
            "(the lines of the last time cannot be read: they are now in {})",
            aside.display()
        ),
        Err(error) => eprintln!(
            "(the lines of the last time cannot be read: {}: {error})",
            path.display()
        ),
    }
}

fn unusable(error: ReadlineError) -> Error {
    Error::input(
        "terminal",
        error,
        "one that can be written to",
        "give the questions through a pipe",
    )
}

impl Input for Editor {
    fn next(&mut self) -> Result<Line> {
        loop {
            if let Some(typing) = self.editor.helper() {
                typing.empty.set(true);
            }
            return match self.editor.readline("> ") {
                Ok(line) => {
                    if !line.trim().is_empty() {
                        self.keep(&line);
                    }
                    Ok(Line::Text(line.replace("\\\n", "\n")))
                }
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupted {
                    empty: self.editor.helper().is_none_or(|typing| typing.empty.get()),
                }),
                Err(ReadlineError::Io(error)) if error.kind() == ErrorKind::InvalidData => {
                    eprintln!(
                        "(the line is dropped: it held bytes that are not UTF-8; set the terminal's encoding to UTF-8)"
                    );
                    continue;
                }
                Err(ReadlineError::Io(error)) => Err(Error::io("standard input", "read")(error)),
                // The terminal changed its size.
                Err(ReadlineError::Signal(_)) => continue,
                Err(other) => Err(unusable(other)),
            };
        }
    }

    fn is_terminal(&self) -> bool {
        true
    }
}

/// Where the lines of a chat are kept: in the user's data folder.
pub fn history_file() -> Option<PathBuf> {
    let variable = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let data = if cfg!(windows) {
        variable("APPDATA")
    } else if cfg!(target_os = "macos") {
        std::env::home_dir().map(|home| home.join("Library/Application Support"))
    } else {
        variable("XDG_DATA_HOME").or_else(|| Some(std::env::home_dir()?.join(".local/share")))
    };
    Some(data?.join("glmtune/chat_history"))
}

/// A path as typed: `~/` is the user's folder.
pub fn expand(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(path),
    }
}

/// What the line editor asks while a line is typed.
struct Typing {
    /// Is there nothing in the line?
    empty: Cell<bool>,
}

impl Helper for Typing {}
impl Highlighter for Typing {}

impl Hinter for Typing {
    type Hint = String;

    /// No hint; but this is called with every change.
    fn hint(&self, line: &str, _: usize, _: &Context<'_>) -> Option<String> {
        self.empty.set(line.is_empty());
        None
    }
}

impl Validator for Typing {
    fn validate(&self, typed: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let line = typed.input();
        let open = line.ends_with('\\') && !line.starts_with('/');
        Ok(match open {
            true => ValidationResult::Incomplete,
            false => ValidationResult::Valid(None),
        })
    }
}

impl Completer for Typing {
    type Candidate = Pair;

    fn complete(&self, line: &str, at: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let (start, words) = completions(&line[..at]);
        let pairs = words.into_iter().map(|word| Pair {
            display: shown(&word),
            replacement: word,
        });
        Ok((start, pairs.collect()))
    }
}

/// Of a path, the last part alone.
fn shown(word: &str) -> String {
    let name = word.trim_end_matches('/');
    match name.rfind('/') {
        Some(i) if i > 0 => word[i + 1..].to_string(),
        _ => word.to_string(),
    }
}

/// What `line` may go on as: from where, and with which words.
fn completions(line: &str) -> (usize, Vec<String>) {
    let Some((name, rest)) = line.split_once(' ') else {
        let names = COMMANDS.iter().map(|(name, ..)| format!("{name} "));
        let names = names.filter(|name| line.starts_with('/') && name.starts_with(line));
        return (0, names.collect());
    };
    let rest = rest.trim_start();
    let start = line.len() - rest.len();
    match name {
        "/save" | "/save!" | "/load" => (start, paths(rest, false)),
        "/adapter" => {
            let off = (!rest.is_empty() && "off".starts_with(rest)).then(|| "off".to_string());
            (start, off.into_iter().chain(paths(rest, true)).collect())
        }
        "/params" => {
            let word = rest.rsplit(' ').next().unwrap_or(rest);
            let keys = PARAMS.iter().filter(|key| key.starts_with(word));
            (
                line.len() - word.len(),
                keys.map(|key| format!("{key}=")).collect(),
            )
        }
        _ => (line.len(), Vec::new()),
    }
}

/// The paths that begin with `typed`, folders with a slash behind them.
fn paths(typed: &str, folders_only: bool) -> Vec<String> {
    let (folder, begun) = typed.split_at(typed.rfind('/').map_or(0, |i| i + 1));
    let place = if folder.is_empty() {
        PathBuf::from(".")
    } else {
        expand(folder)
    };
    let Ok(entries) = std::fs::read_dir(place) else {
        return Vec::new();
    };
    let mut found: Vec<String> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok()?;
            let is_folder = entry.path().is_dir();
            let wanted = name.starts_with(begun) && (begun.starts_with('.') || !name.starts_with('.'));
            let slash = if is_folder { "/" } else { "" };
            (wanted && (is_folder || !folders_only)).then(|| format!("{folder}{name}{slash}"))
        })
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_keys_and_paths_are_completed() {
        assert_eq!(completions("/cl"), (0, vec!["/clear ".to_string()]));
        assert_eq!(completions("/save").1, ["/save ", "/save! "]);
        assert_eq!(completions("你好").1, [""; 0]);
        assert_eq!(
            completions("/params temperature=1 top_"),
            (22, vec!["top_k=".to_string(), "top_p=".to_string()])
        );
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| format!("{}/{name}", dir.path().display());
        std::fs::create_dir(at("适配器 2")).unwrap();
        std::fs::write(at("适用.jsonl"), "").unwrap();
        std::fs::write(at(".hidden"), "").unwrap();
        let begun = at("适");
        assert_eq!(
            completions(&format!("/load {begun}")),
            (6, vec![at("适用.jsonl"), at("适配器 2/")])
        );
        assert_eq!(
            completions(&format!("/adapter {begun}")),
            (9, vec![at("适配器 2/")])
        );
        assert_eq!(completions(&format!("/save  {}", at("."))).1, [at(".hidden")]);
        assert_eq!(completions("/load no/such/folder/").1, [""; 0]);
        assert_eq!(completions("/adapter of").1[0], "off");
        assert_eq!(shown(&at("适配器 2/")), "适配器 2/");
        assert_eq!(shown("/clear "), "/clear ");
    }
}
