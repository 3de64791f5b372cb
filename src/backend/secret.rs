//! What must not stand on a command line: from the environment, or from a file that it names.

use std::path::Path;

use crate::error::{Error, Kind, Result};

/// The value of the variable `name`, or the text of the file that `name` and `_FILE` names; without the
/// white space around it. `None` where neither says anything.
///
/// # Errors
/// `NotFound`, `Denied` or `InvalidInput` for the file.
pub(super) fn from_environment(name: &str) -> Result<Option<String>> {
    let text = match std::env::var(name) {
        Ok(text) => text,
        Err(_) => {
            let Some(path) = std::env::var_os(format!("{name}_FILE")) else {
                return Ok(None);
            };
            String::from_utf8(read(Path::new(&path))?).map_err(|_| {
                let why = format!("the file that {name}_FILE names is not text");
                Error::new(Kind::InvalidInput, why)
            })?
        }
    };
    Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty()))
}

/// A file's bytes; it is named where it cannot be read.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::io(path.display().to_string(), error))
}
