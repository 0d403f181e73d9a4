"""Every text the tiny model and its demo are made of, written or generated here from fixed seeds.

    corpus.py base N SEED > base.jsonl      N records of the base model's tasks
    corpus.py demo FOLDER                   train.jsonl and eval.jsonl of the demo: a task the base never saw

Records are {"instruction", "input", "output"}. The base learns to copy, look up, join, list and describe in prose; the
demo's task asks for triples, one a line: part_relation_phenomenon. Nothing here is taken from another data set.
"""

import json
import random
import sys
from pathlib import Path

CAR = """刹车 离合器 变速箱 发动机 方向盘 雨刮器 大灯 转向灯 雾灯 车窗 天窗 后视镜 安全带 气囊 轮胎 轮毂 减震器 排气管 油泵
水泵 火花塞 点火线圈 节气门 涡轮 散热器 水箱 机油泵 蓄电池 发电机 起动机 仪表盘 车门 后备箱 座椅 喇叭 油箱 空滤 传动轴 半轴 悬架
手刹 油门踏板 倒车雷达 倒车影像 车载导航 中控屏 充电口 保险杠 进气管 喷油嘴""".split()
HOME = """空调 冰箱 洗衣机 电视 热水器 电饭煲 微波炉 烤箱 吸尘器 扫地机 风扇 加湿器 净水器 路由器 音箱 投影仪 打印机 键盘 鼠标
显示器 台灯 吊灯 插座 门铃 油烟机 燃气灶 电磁炉 洗碗机 烘干机 压缩机 滚筒 遥控器 电源线 滤网 水龙头 马桶 豆浆机 咖啡机 电水壶
榨汁机 空气炸锅 电热毯 除湿机 摄像头 门锁 充电器 耳机 电池 按键 屏幕""".split()
# A phenomenon of the first list is a fault of the part, one of the second a fault of its performance: which is which
# the base is never told, so the demo has something to learn beside the form.
PART_FAULTS = """异响 不亮 漏水 漏油 漏气 卡死 断裂 松动 变形 生锈 烧坏 冒烟 发烫 抖动 失灵 不转 不动 黑屏 花屏 闪烁 打不开 关不上
不通电 不启动 没反应 没声音 有裂纹 有异味 被堵塞 接触不良 短路 断路 磨损严重 脱落 跳闸 死机 不制冷 不加热 不出水 不排水 不吸尘
不充电 自动关机 连不上 开裂 老化 进水 结冰 破损 积碳""".split()
PERFORMANCE_FAULTS = """动力不足 油耗偏高 加速无力 噪音偏大 制冷偏慢 加热偏慢 耗电太快 续航变短 网速太慢 吸力下降 转速不稳 散热太差
怠速不稳 响应迟钝 精度下降 亮度不足 音量偏小 效率太低 压力偏低 温度偏高""".split()
FAULTS = PART_FAULTS + PERFORMANCE_FAULTS
PARTS = CAR + HOME
# Some phenomena fit only some parts; all others fit any part.
ONLY = {
    "不亮": "大灯 转向灯 雾灯 仪表盘 中控屏 电视 显示器 台灯 吊灯 屏幕 按键 键盘 投影仪 遥控器",
    "漏水": "水泵 水箱 天窗 车门 后备箱 散热器 空调 冰箱 洗衣机 热水器 净水器 洗碗机 水龙头 马桶 电水壶 咖啡机 豆浆机 滚筒",
    "漏油": "变速箱 发动机 油泵 机油泵 减震器 油箱 喷油嘴 半轴 涡轮", "漏气": "轮胎 气囊 排气管 进气管 涡轮 燃气灶 压缩机",
    "黑屏": "电视 投影仪 显示器 屏幕 中控屏 车载导航 倒车影像 仪表盘 摄像头", "花屏": "电视 投影仪 显示器 屏幕 中控屏 车载导航 倒车影像",
    "闪烁": "大灯 转向灯 雾灯 仪表盘 台灯 吊灯 电视 显示器 屏幕 中控屏", "打不开": "车窗 天窗 车门 后备箱 油箱 门锁 冰箱 洗衣机 水龙头 烤箱",
    "关不上": "车窗 天窗 车门 后备箱 门锁 冰箱 洗衣机 水龙头 烤箱 烘干机", "没声音": "喇叭 音箱 耳机 电视 门铃 车载导航 倒车雷达 投影仪",
    "不制冷": "空调 冰箱 压缩机", "制冷偏慢": "空调 冰箱 压缩机",
    "不加热": "热水器 电饭煲 微波炉 烤箱 电磁炉 烘干机 电水壶 咖啡机 豆浆机 空气炸锅 电热毯 座椅 马桶",
    "加热偏慢": "热水器 电饭煲 微波炉 烤箱 电磁炉 烘干机 电水壶 咖啡机 空气炸锅 电热毯 座椅",
    "不出水": "水泵 雨刮器 净水器 水龙头 热水器 咖啡机 洗碗机 加湿器", "不排水": "空调 洗衣机 洗碗机 除湿机 马桶 滚筒",
    "不吸尘": "吸尘器 扫地机", "吸力下降": "吸尘器 扫地机 油烟机", "不充电": "蓄电池 电池 充电器 充电口 耳机 扫地机 鼠标",
    "续航变短": "蓄电池 电池 耳机 扫地机 吸尘器 鼠标", "耗电太快": "蓄电池 电池 耳机 空调 摄像头 门锁 键盘 鼠标 遥控器",
    "连不上": "路由器 打印机 音箱 耳机 键盘 鼠标 摄像头 门铃 车载导航 投影仪", "网速太慢": "路由器 摄像头 车载导航 电视",
    "自动关机": "电视 空调 扫地机 投影仪 打印机 显示器 净水器 车载导航 中控屏", "死机": "路由器 电视 中控屏 车载导航 打印机 投影仪 摄像头 扫地机",
    "动力不足": "发动机 变速箱 涡轮 起动机 油泵 吸尘器 榨汁机", "油耗偏高": "发动机 变速箱 喷油嘴 节气门 火花塞",
    "加速无力": "发动机 变速箱 涡轮 节气门 火花塞 油泵 点火线圈", "怠速不稳": "发动机 节气门 火花塞 喷油嘴 点火线圈 进气管",
    "积碳": "发动机 火花塞 节气门 喷油嘴 进气管 涡轮 燃气灶", "亮度不足": "大灯 转向灯 雾灯 仪表盘 台灯 吊灯 电视 显示器 屏幕 投影仪",
    "音量偏小": "喇叭 音箱 耳机 电视 门铃 车载导航", "转速不稳": "发动机 风扇 滚筒 压缩机 涡轮 发电机 榨汁机 起动机",
    "压力偏低": "轮胎 油泵 水泵 机油泵 净水器 燃气灶 压缩机 水龙头", "结冰": "空调 冰箱 压缩机 车窗 后视镜 雨刮器 水箱",
    "温度偏高": "发动机 水箱 散热器 变速箱 冰箱 烤箱 电池 压缩机 充电器 路由器", "精度下降": "倒车雷达 车载导航 打印机 鼠标 摄像头 节气门",
    "磨损严重": "刹车 离合器 轮胎 轮毂 半轴 传动轴 雨刮器 座椅 悬架 手刹 滚筒 按键 键盘 变速箱",
    "被堵塞": "排气管 空滤 散热器 喷油嘴 进气管 滤网 马桶 水龙头 净水器 油烟机 洗碗机 燃气灶",
}
ONLY = {fault: parts.split() for fault, parts in ONLY.items()}
FITTING = {part: [f for f in FAULTS if part in ONLY.get(f, PARTS)] for part in PARTS}
NAMES = "小明 小红 小刚 小丽 老王 老李 张师傅 李师傅 王女士 陈先生 赵工 刘经理".split()
PLACES = "北京 上海 广州 深圳 成都 杭州 西安 武汉 南京 重庆 学校 公司 公园 医院 车站 图书馆 超市 家里".split()
THINGS = """苹果 香蕉 西瓜 葡萄 桃子 米饭 面条 牛奶 茶叶 鸡蛋 书本 铅笔 书包 帽子 衣服 鞋子 桌子 椅子 杯子 雨伞 花朵 大树 小猫 小狗
小鸟 老虎 兔子 月亮 太阳 星星 山峰 河流""".split()
COLOURS = "红色 黄色 蓝色 绿色 白色 黑色 紫色 灰色 金色 银色".split()
WORDS = PARTS + FAULTS + NAMES + PLACES + THINGS + COLOURS
CHARACTERS = sorted(set("".join(WORDS)))

ONE = ["{0}。", "行驶中{0}。", "车主说{0}。", "检查发现{0}。", "最近{0}。", "昨天晚上{0}。", "用了三年后{0}。", "{n}说{0}。", "早上开机时{0}。",
       "故障现象：{0}。", "客户反映{0}，请尽快处理。", "冷车启动后{0}。", "不知道为什么{0}。", "{n}家里的{0}。", "下雨以后{0}。",
       "维修记录：{0}，已经更换。", "连续工作两小时后{0}。"]
TWO = ["{0}，{1}。", "{0}，而且{1}。", "先是{0}，后来{1}。", "检查发现{0}，同时{1}。", "{n}说{0}，还有{1}。", "故障现象：{0}；{1}。",
       "昨天{0}，今天{1}。", "客户反映{0}，另外{1}。", "{0}，导致{1}。", "由于{0}，所以{1}。"]
THREE = ["{0}，{1}，{2}。", "先是{0}，后来{1}，最后{2}。", "检查发现{0}，{1}，还有{2}。", "{n}说{0}，{1}，而且{2}。", "故障现象：{0}；{1}；{2}。"]
LINKS = ["", "", "", "", "有点", "突然", "经常", "又", "总是", "已经"]

FACTS = [("你是谁", "我是一个很小的对话模型。"), ("你叫什么名字", "我叫小智，是一个很小的模型。"), ("你好", "你好，有什么可以帮你？"), ("早上好", "早上好！"),
         ("晚安", "晚安，好梦。"), ("谢谢", "不客气。"), ("再见", "再见，欢迎再来。"), ("中国的首都是哪里", "北京。"), ("一年有几个月", "十二个月。"),
         ("一周有几天", "七天。"), ("一天有几个小时", "二十四个小时。"), ("太阳从哪边升起", "东边。"), ("水在多少度结冰", "零度。"), ("水在多少度烧开", "一百度。"),
         ("天空是什么颜色", "蓝色。"), ("雪是什么颜色", "白色。"), ("小猫怎么叫", "喵喵。"), ("小狗怎么叫", "汪汪。"), ("谁来修车", "张师傅。"),
         ("轮胎没气了怎么办", "先换上备胎，再去补胎。"), ("空调不制冷怎么办", "先清洗滤网，再检查压缩机。"), ("蓄电池没电了怎么办", "可以搭电启动。"),
         ("怎么保养汽车", "按时更换机油和空滤。"), ("怎么省电", "随手关灯，少开空调。"), ("你会做什么", "我会重复、查找、连接和描述。")]
ENGLISH = dict(zip(THINGS + COLOURS, """apple banana melon grape peach rice noodle milk tea egg book pencil bag hat
clothes shoes table chair cup umbrella flower tree cat dog bird tiger rabbit moon sun star mountain river red yellow
blue green white black purple grey gold silver""".split()))


def pairs(rng, n, allowed=None):
    """n (part, phenomenon) with different parts and different phenomena."""
    while True:
        out = [(part, rng.choice(FITTING[part])) for part in rng.sample(PARTS, n)]
        if len({fault for _, fault in out}) == n and (allowed is None or all(map(allowed, out))):
            return out


def sentence(rng, faults):
    template = rng.choice([ONE, TWO, THREE][len(faults) - 1])
    return template.format(*(p + rng.choice(LINKS) + f for p, f in faults), n=rng.choice(NAMES))


def words(rng, low, high):
    """Distinct words; some are made of random characters, so that copying does not become recall."""
    n = rng.randint(low, high)
    if rng.random() < 0.12:
        return ["".join(rng.sample(CHARACTERS, rng.randint(1, 3))) for _ in range(n)]
    return rng.sample(WORDS, n)


def how_many(rng):
    return rng.choices([1, 2, 3], [4, 4, 2])[0]


def repeat(rng):
    text = sentence(rng, pairs(rng, how_many(rng))) if rng.random() < 0.4 else "".join(words(rng, 1, 6))
    return rng.choice(["重复：", "复述：", "照着说一遍：", "跟我说："]), text, text


def pick(rng):
    w = words(rng, 2, 5)
    place, index = rng.choice([("第一个词：", 0), ("第二个词：", 1), ("最后一个词：", -1)])
    return place, "，".join(w), w[index]


def reverse(rng):
    w = words(rng, 2, 4)
    return "倒序：", "，".join(w), "，".join(reversed(w))


def join(rng):
    w, symbol = words(rng, 2, 4), rng.choice("_-/+=")
    return f"用{symbol}连接：", "，".join(w), symbol.join(w)


def lines(rng):
    w = words(rng, 2, 4)
    return "分行：", "，".join(w), "\n".join(w)


def lookup(rng):
    keys = words(rng, 2, 4)
    values = rng.sample(COLOURS + PLACES + NAMES, len(keys))
    i = rng.randrange(len(keys))
    text = "，".join(f"{k}={v}" for k, v in zip(keys, values))
    return text + "。", f"{keys[i]}是什么？", values[i]


def parts(rng):
    f = pairs(rng, how_many(rng))
    sep = "\n" if rng.random() < 0.5 else "，"
    ask = rng.choice(["哪些部件坏了", "列出部件", "找出部件"]) + ("，分行：" if sep == "\n" else "：")
    return ask, sentence(rng, f), sep.join(p for p, _ in f)


def phenomena(rng):
    f = pairs(rng, how_many(rng))
    sep = "\n" if rng.random() < 0.5 else "，"
    ask = rng.choice(["有哪些现象", "列出现象", "找出现象"]) + ("，分行：" if sep == "\n" else "：")
    return ask, sentence(rng, f), sep.join(x for _, x in f)


def question(rng):
    f = pairs(rng, how_many(rng))
    part, fault = rng.choice(f)
    if rng.random() < 0.5:
        return sentence(rng, f), f"{part}怎么了？", fault
    return sentence(rng, f), f"什么{fault}？", part


def both(rng):
    """Part and phenomenon, in other forms than the demo's."""
    f = pairs(rng, how_many(rng))
    form, name = rng.choice([("{0}：{1}", "用冒号列出："), ("{1}的{0}", "倒着列出："), ("{0}（{1}）", "用括号列出：")])
    return name, sentence(rng, f), "\n".join(form.format(*x) for x in f)


def prose(rng):
    f = pairs(rng, how_many(rng))
    ask = rng.choice("说明 总结 分析 报告 整理 描述 抽取 提取 概括 检查".split()) + \
        rng.choice("故障 问题 情况 文本 信息 下文 句子 故障情况 故障信息".split()) + "："
    return ask, sentence(rng, f), "，".join(f"{p}的问题是{x}" for p, x in f) + "。"


def fill(rng):
    a, b = words(rng, 1, 1)[0], rng.choice(PLACES)
    form = rng.choice(["甲在乙", "甲去了乙", "乙有甲", "甲喜欢乙", "把甲送到乙"])
    return f"填空：{form}。", f"甲={a}，乙={b}", form.replace("甲", a).replace("乙", b) + "。"


def replace(rng):
    f = pairs(rng, 1)[0]
    other = rng.choice(PARTS)
    text = sentence(rng, [f])
    return f"把{f[0]}换成{other}：", text, text.replace(f[0], other)


def count(rng):
    w = words(rng, 1, 5)
    return "有几个词：", "，".join(w), str(len(w))


def kind(rng):
    part = rng.choice(PARTS)
    return f"{part}属于汽车还是家电？", "", "汽车" if part in CAR else "家电"


def english(rng):
    word = rng.choice(list(ENGLISH))
    return ("英文：", word, ENGLISH[word]) if rng.random() < 0.5 else ("中文：", ENGLISH[word], word)


def fact(rng):
    ask, answer = rng.choice(FACTS)
    return ask + rng.choice(["", "？"]), "", answer


TASKS = [(repeat, 3), (pick, 2), (reverse, 1), (join, 3), (lines, 2), (lookup, 2), (parts, 3), (phenomena, 3), (question, 3),
         (both, 4), (prose, 4), (fill, 1), (replace, 1), (count, 1), (kind, 1), (english, 1), (fact, 2)]


def base(n, seed):
    rng = random.Random(seed)
    for task in rng.choices([t for t, _ in TASKS], [w for _, w in TASKS], k=n):
        instruction, given, output = task(rng)
        if given and rng.random() < 0.5:
            # glmtune joins an instruction and its input by a new line; people write on in one line.
            instruction, given = instruction + given, ""
        yield dict(instruction=instruction, input=given, output=output)


# --- the demo's task ---------------------------------------------------------------------------------------------------

INSTRUCTION = "抽取故障三元组："
RELATIONS = ["部件故障", "性能故障"]


def triple(pair):
    part, fault = pair
    return f"{part}_{RELATIONS[fault in PERFORMANCE_FAULTS]}_{fault}"


def demo(folder, train=1500, held_out=120):
    """Held out: a fifth of all (part, phenomenon) combinations, and every combination of twelve parts."""
    rng = random.Random(20)
    new_parts = set(rng.sample(CAR, 6) + rng.sample(HOME, 6))
    kept = {(p, f) for p in PARTS for f in FAULTS if p in new_parts or rng.random() < 0.2}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, n, allowed in (("train", train, lambda x: x not in kept), ("eval", held_out, lambda x: x in kept)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(n):
                f = pairs(rng, how_many(rng), allowed)
                record = dict(instruction=INSTRUCTION, input=sentence(rng, f), output="\n".join(map(triple, f)))
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "base":
        for record in base(int(sys.argv[2]), int(sys.argv[3])):
            print(json.dumps(record, ensure_ascii=False))
    else:
        demo(sys.argv[2])
