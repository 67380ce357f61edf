//! Crash points: named places in a run's life cycle at which a test lets this process die.
//!
//! **For tests only.** Without debug assertions, as in a release build, `crash_point!` expands to
//! nothing, and this file holds no code: neither the names of the points nor the environment variable
//! are in the binary (`a_release_build_has_no_crash_points` compiles this very file both ways and
//! looks). For that it uses nothing but the standard library.
//!
//! `ATLAS_TEST_CRASH` says what happens where: `reserved` dies when the point is first reached,
//! `settled:2` the second time, `hold.before_ack` stops there for ever instead, so that something else
//! can be made to happen first. A comma separates several.
//!
//! To die is to abort: no destructor runs, nothing is flushed, no lease is given back.

/// Dies here if a test asks for it. Only in async functions.
#[cfg(debug_assertions)]
macro_rules! crash_point {
    ($name:literal) => {
        $crate::crash::reached($name).await
    };
}

/// Nothing at all.
#[cfg(not(debug_assertions))]
macro_rules! crash_point {
    ($name:literal) => {};
}

pub(crate) use crash_point;

#[cfg(debug_assertions)]
pub(crate) use armed::reached;

#[cfg(debug_assertions)]
mod armed {
    use std::{
        io::Write as _,
        sync::{
            OnceLock,
            atomic::{AtomicU32, Ordering},
        },
    };

    /// One entry of `ATLAS_TEST_CRASH`.
    struct Trap {
        name: String,
        /// Springs when this reaches zero.
        left: AtomicU32,
        /// Stop for ever instead of dying.
        hold: bool,
    }

    fn traps() -> &'static [Trap] {
        static TRAPS: OnceLock<Vec<Trap>> = OnceLock::new();
        TRAPS.get_or_init(|| {
            let plan = std::env::var("ATLAS_TEST_CRASH").unwrap_or_default();
            plan.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(Trap::read).collect()
        })
    }

    impl Trap {
        fn read(entry: &str) -> Self {
            let (name, hold) = entry.strip_prefix("hold.").map_or((entry, false), |name| (name, true));
            let (name, count) = name.split_once(':').unwrap_or((name, "1"));
            // A count that is no number springs never, and the test says that its point was not reached.
            Self { name: name.to_owned(), left: AtomicU32::new(count.parse().unwrap_or(0)), hold }
        }
    }

    /// The process got to the point `name`.
    pub(crate) async fn reached(name: &'static str) {
        for trap in traps().iter().filter(|trap| trap.name == name) {
            if trap.left.fetch_sub(1, Ordering::SeqCst) != 1 {
                continue;
            }
            let what = if trap.hold { "holding" } else { "dying" };
            // Whoever closed standard error does not want to know.
            let _ = writeln!(std::io::stderr(), "crash point {name} reached: {what}");
            if trap.hold {
                std::future::pending::<()>().await;
            }
            std::process::abort();
        }
    }
}
