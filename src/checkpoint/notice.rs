//! What a reader of files says beside its result.

use std::collections::BTreeSet;
use std::sync::Mutex;

static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Writes one line to standard error, once in a process: a folder is read more than once, to look at and to load.
pub(crate) fn say_once(line: String) {
    let mut said = SAID.lock().unwrap_or_else(|e| e.into_inner());
    if !said.contains(&line) {
        eprintln!("{line}");
        said.insert(line);
    }
}
