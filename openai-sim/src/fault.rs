//! What can go wrong, how often, and whether it is billed.

use std::{collections::HashMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// One way in which a call goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// 401, as with a wrong key. Not billed.
    #[serde(rename = "401")]
    Unauthorized,
    /// 429 with `Retry-After`. Not billed.
    #[serde(rename = "429")]
    RateLimited,
    /// 429 whose body is HTML, as some proxies send it. Not billed.
    #[serde(rename = "429_html")]
    RateLimitedHtml,
    /// 429 `insufficient_quota`: the account is empty. Not billed.
    InsufficientQuota,
    /// 500. Not billed.
    #[serde(rename = "500")]
    ServerError,
    /// 502 with an HTML body. Not billed.
    #[serde(rename = "502")]
    BadGateway,
    /// 503 with `Retry-After`. Not billed.
    #[serde(rename = "503")]
    Overloaded,
    /// 504 with an HTML body: the proxy gave up, the model did not. Billed.
    #[serde(rename = "504")]
    GatewayTimeout,
    /// 400 `context_length_exceeded`. Not billed.
    ContextLength,
    /// 400 `content_filter`. Not billed.
    ContentFilter,
    /// 400 with another code. Not billed.
    #[serde(rename = "400")]
    BadRequest,
    /// 404 `model_not_found`. Not billed.
    #[serde(rename = "404")]
    ModelNotFound,
    /// No answer until the client gives up. Billed.
    Hang,
    /// Half of the answer, then the connection is cut. Billed.
    Cut,
    /// The connection is cut before a single byte of an answer. Billed.
    Drop,
    /// Half of the answer with a proper end, as from a proxy that lost the rest. Billed.
    Truncated,
    /// Status 200 and a body that is not JSON. Billed.
    Malformed,
    /// Status 200, JSON with `usage`, but without an answer in it. Billed.
    NoChoices,
    /// A good answer that does not say what it cost. Billed.
    NoUsage,
    /// JSON that does not fit the schema that was sent. Billed.
    WrongSchema,
    /// Prose where JSON was asked for. Billed.
    NotJson,
    /// An answer without content. Billed.
    Empty,
    /// The model refuses. Billed.
    Refusal,
    /// The answer stops in the middle, as at the cap. Billed.
    Length,
    /// Cites passages that were not given. Billed.
    BadCitations,
    /// Decisions without alternatives, empty sections, marketing. Billed.
    Sloppy,
    /// HTML, script links, forged sources, orders to the reader. Billed.
    Hostile,
    /// Almost JSON: an unquoted key, a missing bracket. Billed.
    InvalidJson,
    /// Diagrams that do not render. Billed.
    BrokenMermaid,
    /// Wants to say 50,000 tokens; stops at the cap. Billed.
    Endless,
    /// Says 50,000 tokens whatever the cap is, as a broken server would. Billed.
    IgnoresCap,
    /// Calls the search tool, again and again, even when it is not on offer. Billed.
    ToolLoop,
    /// Half of the answer, then `finish_reason: content_filter`. Billed.
    Filtered,
    /// 400 when the answer should be streamed; a good answer otherwise.
    NoStream,
    /// Bills twice as many prompt tokens as were sent. Billed, twice.
    Overbill,
    /// Takes `slow_ms` longer (a script's step may say how long; 2 s otherwise). Billed.
    Slow,
}

impl Fault {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::Unauthorized,
        Self::RateLimited,
        Self::RateLimitedHtml,
        Self::InsufficientQuota,
        Self::ServerError,
        Self::BadGateway,
        Self::Overloaded,
        Self::GatewayTimeout,
        Self::ContextLength,
        Self::ContentFilter,
        Self::BadRequest,
        Self::ModelNotFound,
        Self::Hang,
        Self::Cut,
        Self::Drop,
        Self::Truncated,
        Self::Malformed,
        Self::NoChoices,
        Self::NoUsage,
        Self::WrongSchema,
        Self::NotJson,
        Self::Empty,
        Self::Refusal,
        Self::Length,
        Self::BadCitations,
        Self::Sloppy,
        Self::Hostile,
        Self::InvalidJson,
        Self::BrokenMermaid,
        Self::Endless,
        Self::IgnoresCap,
        Self::ToolLoop,
        Self::Filtered,
        Self::NoStream,
        Self::Overbill,
        Self::Slow,
    ];

    /// True when the call is billed all the same.
    pub fn is_billed(self) -> bool {
        self.refusal_status().is_none()
    }

    /// The status of a fault before generation.
    pub(crate) fn refusal_status(self) -> Option<u16> {
        match self {
            Self::Unauthorized => Some(401),
            Self::RateLimited | Self::RateLimitedHtml | Self::InsufficientQuota => Some(429),
            Self::ServerError => Some(500),
            Self::BadGateway => Some(502),
            Self::Overloaded => Some(503),
            Self::ContextLength | Self::ContentFilter | Self::BadRequest => Some(400),
            Self::ModelNotFound => Some(404),
            _ => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The names of the wire format are the names everywhere.
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(name)) => f.write_str(&name),
            _ => write!(f, "{self:?}"),
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        serde_json::from_value(text.into()).map_err(|_| {
            let known: Vec<String> = Self::ALL.iter().map(ToString::to_string).collect();
            format!("unknown fault {text:?}; known: {}", known.join(", "))
        })
    }
}

/// How often each fault strikes: `429=0.1,500=0.05`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FaultRates(pub Vec<(Fault, f64)>);

impl FromStr for FaultRates {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut rates = Vec::new();
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let Some((name, rate)) = pair.split_once('=') else {
                return Err(format!("{pair:?} is not FAULT=RATE, such as 429=0.1"));
            };
            let rate: f64 = rate.trim().parse().map_err(|_| format!("{rate:?} is not a number"))?;
            if !(0.0..=1.0).contains(&rate) {
                return Err(format!("{name}={rate}: a rate is from 0 to 1"));
            }
            rates.push((name.trim().parse()?, rate));
        }
        if rates.iter().map(|(_, rate)| rate).sum::<f64>() > 1.0 {
            return Err("the rates add up to more than 1".to_owned());
        }
        Ok(Self(rates))
    }
}

/// How often each request id was seen.
#[derive(Debug, Default)]
pub(crate) struct Seen(HashMap<String, u64>);

impl Seen {
    /// A number in [0, 1) that depends on the seed, the id and how often it was seen, not on the order
    /// of concurrent requests. Each `purpose` draws its own.
    pub(crate) fn draw(&mut self, seed: u64, id: &str, purpose: &str) -> f64 {
        let key = format!("{id}\n{purpose}");
        let count = self.0.entry(key.clone()).or_insert(0);
        *count += 1;
        unit(mix(hash(key.as_bytes()) ^ mix(seed) ^ mix(*count)))
    }
}

impl FaultRates {
    /// Which fault a draw means.
    pub(crate) fn pick(&self, draw: f64) -> Option<Fault> {
        let mut below = 0.0;
        self.0.iter().find_map(|(fault, rate)| {
            below += rate;
            (draw < below).then_some(*fault)
        })
    }
}

/// FNV-1a.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The finalizer of `SplitMix64`: every bit of the input moves every bit of the output.
pub(crate) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_checked() {
        let rates: FaultRates = "429=0.1, 500=0.05,wrong_schema=0.01".parse().unwrap();
        assert_eq!(rates.0[0], (Fault::RateLimited, 0.1));
        assert_eq!(rates.0[2], (Fault::WrongSchema, 0.01));
        for (bad, why) in
            [("429", "FAULT=RATE"), ("boom=0.1", "wrong_schema"), ("429=2", "0 to 1"), ("429=x", "number")]
        {
            let error = bad.parse::<FaultRates>().unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        assert!("429=0.6,500=0.6".parse::<FaultRates>().is_err());
    }

    #[test]
    fn every_fault_has_a_name_that_is_read_back() {
        for fault in Fault::ALL {
            assert_eq!(fault.to_string().parse::<Fault>().unwrap(), *fault);
        }
    }

    #[test]
    fn draws_follow_the_rate_and_repeat_with_the_seed() {
        let rates: FaultRates = "429=0.3".parse().unwrap();
        let strikes = |seed: u64| -> Vec<bool> {
            let mut seen = Seen::default();
            (0..2000).map(|n| rates.pick(seen.draw(seed, &format!("task-{n}"), "fault")).is_some()).collect()
        };
        assert_eq!(strikes(7), strikes(7));
        assert_ne!(strikes(7), strikes(8));
        let count = strikes(7).into_iter().filter(|strike| *strike).count();
        assert!((500..700).contains(&count), "{count} of 2000 at a rate of 0.3");
    }
}
