"""More decoders of transformers, each once packed and once padded: what one document at a time gives with eager."""

import pytest
import torch

from transformers_cases import LENGTHS, MASKS, positions_of, tokens
from transformers_judge import TOLERANCE
from transformers_models import GROUPED, WINDOW, transformers

#: Configurations; those with a number of keys that a query sees are given it.
NAMES = (
    "ApertusConfig", "ArceeConfig", "BioGptConfig", "CohereConfig", "DiffLlamaConfig", "Ernie4_5Config",
    "Gemma4TextConfig", "Glm4MoeConfig", "GlmConfig", "GPTNeoXConfig", "GraniteConfig", "GraniteMoeConfig",
    "HeliumConfig", "HunYuanDenseV1Config", "JetMoeConfig", "MixtralConfig", "NemotronConfig",
    "Olmo2Config", "OPTConfig", "PersimmonConfig", "Phi3Config", "PhiConfig", "Qwen2Config", "Qwen2MoeConfig",
    "Qwen3MoeConfig", "SeedOssConfig", "SmolLM3Config", "StableLmConfig", "VaultGemmaConfig",
)  # fmt: skip
WINDOWED = ("Cohere2Config", "Exaone4Config", "Olmo3Config", "Starcoder2Config")


pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [*NAMES, *WINDOWED])
def test_equals_one_document_at_a_time(name):
    config = getattr(transformers, name)(**GROUPED, **({"sliding_window": WINDOW} if name in WINDOWED else {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    mask = torch.tensor(MASKS["left"])
    packed, padded = tokens(1, sum(LENGTHS)), tokens(3, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        want = [model(input_ids=x).logits[0] for x in packed.split(LENGTHS, 1)]
        want += [model(input_ids=x[m.bool()][None]).logits[0] for x, m in zip(padded, mask, strict=True)]
        model.set_attn_implementation("anyattn")
        assert model.config._attn_implementation == "anyattn"
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        got = [model(input_ids=packed, position_ids=positions).logits[0]]
        logits = model(input_ids=padded, attention_mask=mask, position_ids=positions_of(mask)).logits
        got.append(logits[mask.bool()])
    torch.testing.assert_close(torch.cat(got), torch.cat(want), atol=TOLERANCE, rtol=2e-4)
