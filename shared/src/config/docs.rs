//! The table of settings as documents. The files in the repository are these texts; a test compares.

use std::fmt::Write as _;

use super::{Group, SETTINGS, Setting};

/// `docs/CONFIGURATION.md`.
pub fn markdown() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         <!-- Written by `atlas config docs` from the table in shared/src/config/settings.rs: change that. -->\n\n\
         Every setting is an environment variable. A blank value counts as unset. For each secret `NAME_FILE` \
         works too and names a file that holds it. Wrong settings are reported all at once, at start; \
         `atlas doctor` reports them too and checks what they point to.\n\n\
         The `atlas` command also reads the file that `--env-file FILE` (or `ATLAS_ENV_FILE`) names; the \
         environment wins over it. A `.env` in the current folder is not read unless you name it, because \
         `atlas` runs inside repositories that others wrote.\n",
    );
    for (group, settings) in groups() {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n## {}\n\n| Variable | Default | Meaning |\n|---|---|---|\n", group.title());
        for setting in settings {
            let default = match setting.default {
                Some(default) => format!("`{default}`"),
                None => String::new(),
            };
            let secret = if setting.secret { " *(secret)*" } else { "" };
            let _ = writeln!(
                text,
                "| `{}`{secret} | {default} | {} |",
                setting.name,
                setting.doc.replace('|', "\\|")
            );
        }
    }
    text
}

/// `.env.example`: everything commented out, so that a copy changes nothing until it is edited.
pub fn env_example() -> String {
    let mut text = String::from(
        "# Settings of Atlas: copy to .env, uncomment what you set. Explained in docs/CONFIGURATION.md.\n\
         # Written by `atlas config env`. Use it with: atlas --env-file .env …\n\
         # Never commit your copy. Instead of NAME=secret, NAME_FILE=/path/to/file works too.\n",
    );
    for (group, settings) in groups() {
        let _ = writeln!(text, "\n# --- {} ---", group.title());
        for setting in settings {
            let secret = if setting.secret { " (secret)" } else { "" };
            let _ = writeln!(text, "\n# {}{secret}", setting.doc);
            let _ = writeln!(text, "#{}={}", setting.name, setting.default.unwrap_or_default());
        }
    }
    text
}

/// The settings by group, both in the table's order.
fn groups() -> Vec<(Group, Vec<&'static Setting>)> {
    let mut groups: Vec<(Group, Vec<&'static Setting>)> = Vec::new();
    for setting in SETTINGS {
        match groups.iter_mut().find(|(group, _)| *group == setting.group) {
            Some((_, settings)) => settings.push(setting),
            None => groups.push((setting.group, vec![setting])),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_file(path: &str, expected: &str, command: &str) {
        let path = format!("{}/../{path}", env!("CARGO_MANIFEST_DIR"));
        if std::env::var("ATLAS_UPDATE_DOCS").is_ok_and(|value| value == "1")
            && let Err(error) = std::fs::write(&path, expected)
        {
            unreachable!("{path} cannot be written: {error}");
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            found == expected,
            "{path} is not what the settings say: write it anew with `{command}`, or run this test with ATLAS_UPDATE_DOCS=1"
        );
    }

    #[test]
    fn the_files_in_the_repository_are_up_to_date() {
        assert_file("docs/CONFIGURATION.md", &markdown(), "atlas config docs > docs/CONFIGURATION.md");
        assert_file(".env.example", &env_example(), "atlas config env > .env.example");
    }

    #[test]
    fn every_setting_is_in_both() {
        for setting in SETTINGS {
            assert!(markdown().contains(&format!("| `{}`", setting.name)), "{}", setting.name);
            assert!(env_example().contains(&format!("\n#{}=", setting.name)), "{}", setting.name);
        }
    }
}
